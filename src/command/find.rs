//! Finds the command the way the shell would, before a message is taken that nobody could work on.

use crate::exit::{Exit, Failure};
use nix::unistd::{AccessFlags, access};
use std::{
    ffi::OsStr,
    fs::File,
    io::{ErrorKind, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Linux reads no more of a `#!` line than this (`BINPRM_BUF_SIZE`).
const INTERPRETER_LINE_MAX: u64 = 256;

/// Where execvp(3) looks when there is no `PATH` (musl's default).
const DEFAULT_PATH: &str = "/usr/local/bin:/bin:/usr/bin";

/// Finds the program that a command's first word names, in the folders of `path` unless it has a slash.
///
/// # Errors
/// 127 when there is no such file or its interpreter isn't there, 126 when one of them can't be executed.
pub fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Failure> {
    let file = look_up(name, path)?;
    check_interpreter(&file)?;
    Ok(file)
}

fn look_up(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Failure> {
    if name.is_empty() {
        return Err(Failure::new(Exit::NotFound, "the command is an empty word"));
    }
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return executable(&file).map(|()| file);
    }
    let mut refused = None;
    for folder in std::env::split_paths(path.unwrap_or(OsStr::new(DEFAULT_PATH))) {
        // An empty entry of PATH is the current directory, which the file name alone would be looked up in again.
        let file = Path::new(".").join(folder).join(name);
        match executable(&file) {
            Ok(()) => return Ok(file),
            Err(failure) if failure.exit == Exit::NotFound => {}
            Err(failure) => refused = refused.or(Some(failure)),
        }
    }
    Err(refused.unwrap_or_else(|| {
        let name = name.display();
        Failure::new(Exit::NotFound, format!("command not found: {name} is in none of the folders of PATH"))
    }))
}

fn executable(file: &Path) -> Result<(), Failure> {
    let shown = file.display();
    let why = match std::fs::metadata(file) {
        Ok(found) if found.is_dir() => " is a folder".to_owned(),
        // The kernel executes none, and to read the first line of a FIFO would take for ever.
        Ok(found) if !found.is_file() => " is no regular file".to_owned(),
        Err(error) if error.kind() != ErrorKind::PermissionDenied => {
            let text = format!("command not found: no file {shown}");
            return Err(Failure::new(Exit::NotFound, text));
        }
        // Whoever may not look into its folder may not execute it either.
        _ => match access(file, AccessFlags::X_OK) {
            Ok(()) => return Ok(()),
            Err(error) => format!(": {}; set its execute bit (chmod +x)", error.desc()),
        },
    };
    let text = format!("command not executable: {shown}{why}");
    Err(Failure::new(Exit::NotExecutable, text))
}

/// A script whose interpreter is missing fails with the same "no such file" as a missing script; say which it is.
fn check_interpreter(file: &Path) -> Result<(), Failure> {
    let Some(interpreter) = interpreter(file) else {
        return Ok(());
    };
    let Err(Failure { exit, .. }) = executable(&interpreter) else {
        return Ok(());
    };
    let shown = interpreter.as_os_str().as_bytes();
    let hint = match shown.last() {
        Some(b'\r') => "; the file has Windows line ends",
        _ => "",
    };
    let (file, shown) = (file.display(), shown.escape_ascii());
    let text = match exit {
        Exit::NotFound => {
            format!("{file} asks for the interpreter {shown}, which isn't there{hint}")
        }
        _ => format!("{file} asks for the interpreter {shown}, which can't be executed{hint}"),
    };
    Err(Failure::new(exit, text))
}

/// What the `#!` line names; none for a binary, or for a file that may be executed but not read.
fn interpreter(file: &Path) -> Option<PathBuf> {
    let mut start = Vec::new();
    File::open(file).ok()?.take(INTERPRETER_LINE_MAX).read_to_end(&mut start).ok()?;
    let line = start.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    let word = line.trim_ascii_start().split(|&b| b == b' ' || b == b'\t').next()?;
    (!word.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(word)))
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
            ("./nowhere", Exit::NotFound, "no file ./nowhere"),
            ("plain", Exit::NotExecutable, "execute bit"),
            ("folder", Exit::NotExecutable, "is a folder"),
            ("fifo", Exit::NotExecutable, "is no regular file"),
            ("lost", Exit::NotFound, "/no/such/interpreter"),
            ("windows", Exit::NotFound, r"/bin/sh\r, which isn't there; the file has Windows line ends"),
            ("unable", Exit::NotExecutable, "can't be executed"),
            ("", Exit::NotFound, "empty"),
        ] {
            let failure = folder.find(name).unwrap_err();
            assert_eq!(failure.exit, exit, "{name}");
            assert!(failure.message.contains(says), "{name}: {failure}");
        }
    }

    #[test]
    fn a_later_folder_of_path_may_have_what_an_earlier_one_cannot_execute() {
        let first = Folder::new("first");
        let second = Folder::new("second");
        first.file("tool", b"", 0o644);
        let good = second.file("tool", b"", 0o755);
        let path = std::env::join_paths([&first.0, &second.0]).unwrap();
        assert_eq!(find(OsStr::new("tool"), Some(&path)).unwrap(), good);
    }
}
