//! Finds the command as execvp(3) and env(1) would, before a message is taken.

use crate::exit::{Exit, Failure, shortage};
use nix::{
    errno::Errno,
    libc,
    sys::statvfs::{FsFlags, statvfs},
    unistd::{AccessFlags, access},
};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

/// In bytes: Linux reads no more of a `#!` line (`BINPRM_BUF_SIZE`).
const FIRST_LINE_MAX: u64 = 256;

/// Linux refuses interpreters that nest deeper (ELOOP). Ends the search if a script names itself.
const LEVELS_MAX: usize = 5;

/// musl's, for execvp(3) without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/bin:/usr/bin";

/// Finds the program `name` in the folders of `path`. A name with a slash is the file itself. Fails with 71, 126 or
/// 127.
pub fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Failure> {
    find_with_env(name, path, 0).map_err(|Problem { exit, what, why, no_such_file }| {
        let message = match exit {
            Exit::NotFound if no_such_file => format!("command not found: no file {what}"),
            Exit::NotFound => format!("command not found: {what} {why}"),
            Exit::NotExecutable => format!("command not executable: {what} {why}"),
            _ => format!("the command can't be looked up: {what} {why}"),
        };
        Failure::new(exit, message)
    })
}

/// 127 for ENOENT and 126 for other errors, as env(1), timeout(1) and bash have it, except for the node's problems: 71.
pub(super) fn exit_for(error: &io::Error) -> Exit {
    match error.raw_os_error() {
        _ if shortage(error).is_some() || is_dead_mount(error) => Exit::OsError,
        Some(libc::ENOENT) => Exit::NotFound,
        _ => Exit::NotExecutable,
    }
}

/// A file system returns these errors when it has lost its server, its daemon or its device.
fn is_dead_mount(error: &io::Error) -> bool {
    const REASONS: [i32; 17] = [
        libc::EIO,
        libc::ENXIO,
        libc::ENODEV,
        libc::ENOLINK,
        libc::EREMOTEIO,
        libc::EUCLEAN,
        libc::ENETDOWN,
        libc::ENETUNREACH,
        libc::ECONNABORTED,
        libc::ECONNRESET,
        libc::ENOTCONN,
        libc::ESHUTDOWN,
        libc::ETIMEDOUT,
        libc::ECONNREFUSED,
        libc::EHOSTDOWN,
        libc::EHOSTUNREACH,
        libc::ESTALE,
    ];
    error.raw_os_error().is_some_and(|code| REASONS.contains(&code))
}

/// Why a program can't be executed: `what` and `why` make a sentence.
struct Problem {
    exit: Exit,
    what: String,
    why: String,
    no_such_file: bool,
}

impl Problem {
    fn new(exit: Exit, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: why.into(), no_such_file: false }
    }

    fn from_io(file: &Path, error: &io::Error) -> Self {
        let exit = exit_for(error);
        let why = match (exit, shortage(error), error.raw_os_error()) {
            (Exit::NotFound, ..) => "isn't there".to_owned(),
            (_, Some(words), _) => format!("can't be opened: {words}: {error}; another try may help"),
            (Exit::OsError, ..) => {
                format!("can't be opened: {error}; its mount doesn't answer on this node, another try may help")
            }
            (.., Some(libc::EACCES)) => {
                format!("can't be opened: {error}; this user may not enter one of the folders above it")
            }
            _ => format!("can't be opened: {error}"),
        };
        let no_such_file = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR));
        Self { no_such_file, ..Self::new(exit, file.display().to_string(), why) }
    }

    fn in_script(self, file: &Path, asks: &str, name: &[u8]) -> Self {
        let hint = match name {
            [.., b'\r'] => "; the file has Windows line ends",
            // Without -S, env(1) takes the whole line for the program's name.
            _ if asks == ENV && name.contains(&b' ') => "; to pass options, write env -S",
            _ => "",
        };
        // Escaped, so that the carriage return of the first hint is seen.
        let why = format!("{asks} {}, which {}{hint}", self.what.escape_debug(), self.why);
        Self::new(self.exit, file.display().to_string(), why)
    }
}

const INTERPRETER: &str = "asks for the interpreter";
const ENV: &str = "asks env for";

#[derive(Debug, PartialEq, Eq)]
struct EnvCommand {
    name: OsString,
    path: Option<OsString>,
}

/// Finds the file that execvp(3) would execute, and checks the program that env(1) would start for it.
fn find_with_env(name: &OsStr, path: Option<&OsStr>, level: usize) -> Result<PathBuf, Problem> {
    let (file, command) = find_in_path(name, path)?;
    if let Some(EnvCommand { name, path }) = command
        && level < LEVELS_MAX
    {
        find_with_env(&name, path.as_deref(), level + 1)
            .map_err(|problem| problem.in_script(&file, ENV, name.as_bytes()))?;
    }
    Ok(file)
}

fn find_in_path(name: &OsStr, path: Option<&OsStr>) -> Result<(PathBuf, Option<EnvCommand>), Problem> {
    if name.is_empty() {
        return Err(Problem::new(Exit::NotFound, "the command", "is an empty word"));
    }
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return check_interpreters(&file, path, 0).map(|command| (file, command));
    }
    let mut reported: Option<Problem> = None;
    for folder in std::env::split_paths(path.unwrap_or(OsStr::new(DEFAULT_PATH))) {
        // An empty entry means the current directory. The `./` gives the result a slash, so execvp(3) won't search
        // PATH. An absolute folder replaces the dot.
        let file = Path::new(".").join(folder).join(name);
        // After an error try the next folder, as bash does, and execvp(3) after ENOENT, ENOTDIR and EACCES.
        match check_interpreters(&file, path, 0) {
            Ok(command) => return Ok((file, command)),
            Err(problem) if problem.no_such_file => {}
            // Report 71 before 126, as the program may be on a mount that doesn't answer, and 126 before 127.
            Err(problem) => match &reported {
                Some(reported) if reported.exit.status() <= problem.exit.status() => {}
                _ => reported = Some(problem),
            },
        }
    }
    let nowhere = || Problem::new(Exit::NotFound, name.display().to_string(), "is in none of the folders of PATH");
    Err(reported.unwrap_or_else(nowhere))
}

/// Checks the file, its interpreter, that one's interpreter and so on. Accepts what it can't check: an unreadable
/// script, or one whose interpreters nest too deep. Returns the program that env(1) is to start, if env(1) is the last
/// one.
fn check_interpreters(file: &Path, path: Option<&OsStr>, level: usize) -> Result<Option<EnvCommand>, Problem> {
    check_executable(file)?;
    let line = match first_line(file) {
        Ok(Some(line)) if level < LEVELS_MAX => line,
        Err(error) if exit_for(&error) == Exit::OsError => return Err(Problem::from_io(file, &error)),
        _ => return Ok(None),
    };
    let end = line.iter().position(is_blank).unwrap_or(line.len());
    let (interpreter, argument) = (&line[..end], trim_blanks(&line[end..]));
    let interpreter = Path::new(OsStr::from_bytes(interpreter));
    let command = check_interpreters(interpreter, path, level + 1)
        .map_err(|problem| problem.in_script(file, INTERPRETER, interpreter.as_os_str().as_bytes()))?;
    let is_env = interpreter.file_name().is_some_and(|name| name == "env");
    Ok(if is_env { env_command(argument, path) } else { command })
}

fn check_executable(file: &Path) -> Result<(), Problem> {
    let found = fs::metadata(file).map_err(|error| Problem::from_io(file, &error))?;
    let mode = found.permissions().mode();
    let unable = |why| Err(Problem::new(Exit::NotExecutable, file.display().to_string(), why));
    if found.is_dir() {
        return unable("is a folder".to_owned());
    }
    // The kernel executes only regular files, and reading a FIFO could take for ever.
    if !found.is_file() {
        return unable("is no regular file".to_owned());
    }
    match access(file, AccessFlags::X_OK) {
        Ok(()) => Ok(()),
        Err(Errno::EACCES) if mode & 0o111 == 0 => {
            unable("can't be executed: set its execute bit (chmod +x)".to_owned())
        }
        Err(Errno::EACCES) if statvfs(file).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_NOEXEC)) => {
            unable("is on a mount that forbids execution (noexec): move it, or run it by its interpreter".to_owned())
        }
        Err(Errno::EACCES) => unable(format!(
            "may not be executed by this user: its mode is {:o}, its owner {}",
            mode & 0o7777,
            found.uid()
        )),
        Err(error) => Err(Problem::from_io(file, &error.into())),
    }
}

/// What follows the `#!`, without blanks at either end. `None` for a binary, and if the line is too long.
fn first_line(file: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut start = Vec::new();
    let read = File::open(file)?.take(FIRST_LINE_MAX).read_to_end(&mut start)?;
    let end = start.iter().position(|c| matches!(c, b'\n' | 0));
    let Some(end) = end.or_else(|| ((read as u64) < FIRST_LINE_MAX).then_some(read)) else {
        return Ok(None);
    };
    let line = start[..end].strip_prefix(b"#!").map(trim_blanks);
    Ok(line.filter(|line| !line.is_empty()).map(<[u8]>::to_vec))
}

/// As the kernel separates words: a carriage return is part of a word.
fn is_blank(c: &u8) -> bool {
    matches!(c, b' ' | b'\t')
}

fn trim_blanks(text: &[u8]) -> &[u8] {
    let start = text.iter().take_while(|c| is_blank(c)).count();
    let end = text.iter().rev().take_while(|c| is_blank(c)).count();
    text.get(start..text.len() - end).unwrap_or_default()
}

/// Reads the argument as env(1) of GNU coreutils 9.1 does. `None` if it names no program, or if we can't tell.
fn env_command(argument: &[u8], path: Option<&OsStr>) -> Option<EnvCommand> {
    let split_options: [&[u8]; 3] = [b"-S", b"-vS", b"--split-string="];
    let text = split_options.into_iter().find_map(|option| argument.strip_prefix(option));
    let is_split = text.is_some();
    let mut words = text.unwrap_or(argument).split(|c| is_split && is_blank(c)).filter(|word| !word.is_empty());
    let mut path = path.map(OsStr::to_owned);
    while let Some(word) = words.next() {
        if is_split && word.iter().any(|c| matches!(c, b'\\' | b'\'' | b'"' | b'#')) {
            return None;
        }
        match word {
            b"-" | b"-i" | b"--ignore-environment" | b"-uPATH" | b"--unset=PATH" => path = None,
            b"-u" | b"--unset" => {
                if words.next() == Some(b"PATH") {
                    path = None;
                }
            }
            b"-v" | b"--debug" => {}
            _ if word.starts_with(b"-u") || word.starts_with(b"--unset=") => {}
            [b'-', ..] => return None,
            _ => {
                let new_path = word.strip_prefix(b"PATH=");
                let is_program = !word.contains(&b'=');
                // The value of ${NAME} isn't known here. It matters only in PATH and in the program's name.
                let is_expanded = is_split && word.contains(&b'$');
                if is_expanded && (is_program || new_path.is_some()) {
                    return None;
                }
                if is_program {
                    return Some(EnvCommand { name: OsStr::from_bytes(word).to_owned(), path });
                }
                if let Some(folders) = new_path {
                    path = Some(OsStr::from_bytes(folders).to_owned());
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("qconsume-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, text: &[u8], mode: u32) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }

        fn find(&self, name: &str) -> Result<PathBuf, Failure> {
            find(OsStr::new(name), Some(self.0.as_os_str()))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn statuses_are_those_of_the_shell() {
        let folder = Folder::new("find");
        folder.file("good", b"#!/bin/sh\n", 0o755);
        folder.file("spaced", b"#! \t/bin/sh -e\n", 0o755);
        folder.file("plain", b"#!/bin/sh\n", 0o644);
        folder.file("lost", b"#!/no/such/interpreter\n", 0o755);
        folder.file("windows", b"#!/bin/sh\r\n", 0o755);
        folder.file("binary", b"\x7fELF", 0o755);
        std::fs::create_dir(folder.0.join("folder")).unwrap();
        nix::unistd::mkfifo(&folder.0.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let interpreted = format!("#!{}\n", folder.0.join("plain").display());
        folder.file("unable", interpreted.as_bytes(), 0o755);

        for name in ["good", "spaced", "binary"] {
            assert_eq!(folder.find(name).unwrap(), folder.0.join(name));
        }
        for (name, exit, says) in [
            ("nowhere", Exit::NotFound, "none of the folders of PATH"),
            ("./nowhere", Exit::NotFound, "command not found: no file ./nowhere"),
            ("plain", Exit::NotExecutable, "plain can't be executed: set its execute bit (chmod +x)"),
            ("folder", Exit::NotExecutable, "is a folder"),
            ("fifo", Exit::NotExecutable, "is no regular file"),
            ("lost", Exit::NotFound, "lost asks for the interpreter /no/such/interpreter, which isn't there"),
            ("windows", Exit::NotFound, r"/bin/sh\r, which isn't there; the file has Windows line ends"),
            ("unable", Exit::NotExecutable, "plain, which can't be executed: set its execute bit"),
            ("", Exit::NotFound, "empty"),
        ] {
            let failure = folder.find(name).unwrap_err();
            assert_eq!(failure.exit, exit, "{name}");
            assert!(failure.message.contains(says), "{name}: {failure}");
        }
    }

    #[test]
    fn statuses_follow_the_systems_reason() {
        let folder = Folder::new("reasons");
        folder.file("file", b"", 0o755);
        let path = |name: &str| folder.0.join(name).into_os_string().into_string().unwrap();
        std::os::unix::fs::symlink(path("b"), path("a")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("b")).unwrap();
        folder.file("loop", format!("#!{}\n", path("a")).as_bytes(), 0o755);
        folder.file("below", format!("#!{}\n", path("file/below")).as_bytes(), 0o755);
        let long = "n".repeat(300);
        for (name, exit, says) in [
            (path("a"), Exit::NotExecutable, "a can't be opened: Too many levels of symbolic links"),
            ("a".to_owned(), Exit::NotExecutable, "a can't be opened: Too many levels of symbolic links"),
            (path("file/below"), Exit::NotExecutable, "file/below can't be opened: Not a directory"),
            (path(&long), Exit::NotExecutable, "can't be opened: File name too long"),
            (long, Exit::NotExecutable, "can't be opened: File name too long"),
            (path("loop"), Exit::NotExecutable, "a, which can't be opened: Too many levels of symbolic links"),
            (path("below"), Exit::NotExecutable, "file/below, which can't be opened: Not a directory"),
        ] {
            let failure = folder.find(&name).unwrap_err();
            assert_eq!(failure.exit, exit, "{name}");
            assert!(failure.message.contains(says), "{name}: {failure}");
        }
        let failure = find(OsStr::new("nowhere"), Some(OsStr::new(&path("file")))).unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
    }

    #[test]
    fn the_nodes_trouble_is_not_the_commands() {
        let exit = |code| exit_for(&io::Error::from_raw_os_error(code));
        for code in
            [libc::ENOTCONN, libc::ESTALE, libc::EIO, libc::EHOSTDOWN, libc::ETIMEDOUT, libc::ENOMEM, libc::EMFILE]
        {
            assert_eq!(exit(code), Exit::OsError, "{}", io::Error::from_raw_os_error(code));
        }
        for code in [libc::EACCES, libc::ELOOP, libc::ENAMETOOLONG, libc::ENOTDIR, libc::EPERM, libc::ENOEXEC] {
            assert_eq!(exit(code), Exit::NotExecutable, "{}", io::Error::from_raw_os_error(code));
        }
        assert_eq!(exit(libc::ENOENT), Exit::NotFound);
    }

    #[test]
    fn what_env_starts_is_looked_up_where_env_would() {
        let folder = Folder::new("env");
        let other = Folder::new("env-other");
        folder.file("python", b"", 0o755);
        folder.file("plain", b"", 0o644);
        folder.file("shim", b"#!/usr/bin/env no-such-program\n", 0o755);
        other.file("tool", b"", 0o755);
        let elsewhere = other.0.display();
        let run = |line: &str| {
            folder.file("script", line.as_bytes(), 0o755);
            folder.find("script")
        };
        for line in [
            "#!/usr/bin/env python",
            "#! /usr/bin/env \t python \t\n",
            "#!/usr/bin/env -S python -u\n",
            "#!/usr/bin/env -vS FOO=bar LANG=${LANG} python -c 'import os'\n",
            "#!/usr/bin/env --split-string=python\n",
            &format!("#!/usr/bin/env -S PATH={elsewhere} tool\n"),
            &format!("#!/usr/bin/env -S -i -u FOO --unset=BAR PATH={elsewhere} tool\n"),
            "#!/usr/bin/env -S -i env\n",
            "#!/usr/bin/env -S -u PATH env\n",
            // Lines that start nothing, or that we can't interpret, are left to the kernel and env.
            "#!/usr/bin/env\n",
            "#!/usr/bin/env FOO=bar\n",
            "#!/usr/bin/env -i\n",
            "#!/usr/bin/env -u FOO no-such-program\n",
            "#!/usr/bin/env -S -C /tmp no-such-program\n",
            "#!/usr/bin/env -S 'no-such-program'\n",
            "#!/usr/bin/env -S ${SHELL} -c\n",
            "#!/usr/bin/env -S PATH=${HOME}/bin no-such-program\n",
            "#!/usr/bin/env -S #no-such-program\n",
            "#!/bin/sh no-such-program\n",
            "#!/usr/bin/env script\n",
            &format!("#!/usr/bin/env {}", "n".repeat(300)),
        ] {
            assert!(run(line).is_ok(), "{line}: {:?}", run(line));
        }
        let nowhere = "asks env for no-such-program, which is in none of the folders of PATH";
        for (line, exit, says) in [
            ("#!/usr/bin/env no-such-program\n", Exit::NotFound, nowhere),
            ("#!/usr/bin/env -S no-such-program -u\n", Exit::NotFound, nowhere),
            ("#!/usr/bin/env -S FOO=bar no-such-program\n", Exit::NotFound, nowhere),
            ("#!/usr/bin/env -S PATH=/no/such python\n", Exit::NotFound, "python, which is in none of"),
            ("#!/usr/bin/env -S -i python\n", Exit::NotFound, "python, which is in none of"),
            ("#!/usr/bin/env python -u\n", Exit::NotFound, "to pass options, write env -S"),
            (
                "#!/usr/bin/env python\r\n",
                Exit::NotFound,
                r"python\r, which is in none of the folders of PATH; the file has",
            ),
            ("#!/usr/bin/env /no/such/python\n", Exit::NotFound, "/no/such/python, which isn't there"),
            ("#!/usr/bin/env plain\n", Exit::NotExecutable, "plain, which can't be executed: set its execute bit"),
            ("#!/usr/bin/env shim\n", Exit::NotFound, nowhere),
            ("#!/no/such/env python\n", Exit::NotFound, "interpreter /no/such/env, which isn't there"),
        ] {
            let failure = run(line).unwrap_err();
            assert_eq!(failure.exit, exit, "{line}");
            assert!(failure.message.contains(says), "{line}: {failure}");
        }
        let runner = folder.file("runner", b"#!/usr/bin/env no-such-program\n", 0o755);
        let failure = run(&format!("#!{}\n", runner.display())).unwrap_err();
        assert!(failure.message.contains(nowhere), "{failure}");
        let itself = folder.0.join("itself");
        folder.file("itself", format!("#!{}\n", itself.display()).as_bytes(), 0o755);
        assert!(folder.find("itself").is_ok(), "the kernel says ELOOP");
    }

    #[test]
    fn a_later_folder_of_path_may_have_what_an_earlier_one_cannot_execute() {
        let first = Folder::new("first");
        let second = Folder::new("second");
        let good = second.file("tool", b"", 0o755);
        let path = std::env::join_paths([&first.0, &second.0]).unwrap();
        let find = || find(OsStr::new("tool"), Some(&path));
        first.file("tool", b"", 0o644);
        assert_eq!(find().unwrap(), good);
        first.file("tool", b"#!/no/such/interpreter\n", 0o755);
        assert_eq!(find().unwrap(), good);
        // No later folder helps if env(1) can't find its program: by then, the kernel has started env(1).
        first.file("tool", b"#!/usr/bin/env no-such-program\n", 0o755);
        assert_eq!(find().unwrap_err().exit, Exit::NotFound);
        second.file("tool", b"", 0o644);
        first.file("tool", b"#!/no/such/interpreter\n", 0o755);
        assert_eq!(find().unwrap_err().exit, Exit::NotExecutable);
        first.file("tool", b"", 0o644);
        assert!(find().unwrap_err().message.contains(&*first.0.to_string_lossy()));
    }
}
