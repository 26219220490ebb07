//! The look-up of the command: if it fails, no message is taken.

use crate::common::worker;
use nix::libc;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use testbed::{Broker, Program, missing, owner, owner::temp_folder};

/// Mounts a FUSE file system on which every look-up fails with this error number, or, if it is 0, whose server has
/// died; then runs the program.
const FUSE: &str = r#"
import ctypes, os, struct, sys
error, where, program = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
libc, device = ctypes.CDLL(None), os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
if libc.mount(b"test", where.encode(), b"fuse", 0, options.encode()):
    sys.exit("can't mount")
if error and os.fork() == 0:
    libc.prctl(1, 9)  # PR_SET_PDEATHSIG
    while True:
        request = os.read(device, 1 << 17)
        size, code, unique = struct.unpack("<IIQ", request[:16])
        if code == 26:  # FUSE_INIT
            body = struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 0, 0, 65536, 1, 0, 0, 0) + bytes(28)
            os.write(device, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)
        elif code not in (2, 36):  # FUSE_FORGET and FUSE_INTERRUPT have no answer
            os.write(device, struct.pack("<IiQ", 16, -error, unique))
os.close(device)
os.execvp(program[0], program)
"#;

/// Runs a program in a mount namespace with such a file system.
fn with_fuse(program: Program, error: i32, mount: &Path) -> Program {
    let program = program.through(["unshare", "--mount", "--propagation", "private", "python3", "-c", FUSE]);
    program.through([error.to_string().as_ref(), mount.as_os_str()])
}

fn executable(path: PathBuf, text: &str) -> String {
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.into_os_string().into_string().unwrap()
}

#[test]
fn a_mount_that_does_not_answer_is_71_and_no_message_is_taken() {
    let folder = temp_folder("mount");
    let mount = folder.join("mount");
    fs::create_dir(&mount).unwrap();
    if !owner::is_root() || with_fuse(Program::new("true"), 0, &mount).run().status() != 0 {
        return missing("root, FUSE, unshare and python3");
    }
    let on_mount = mount.join("worker").into_os_string().into_string().unwrap();
    let script = executable(folder.join("script"), &format!("#!{on_mount}\n"));
    let by_env = executable(folder.join("by-env"), "#!/usr/bin/env worker\n");
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", mount.display());
    let queue = Broker::shared().queue("mount");
    queue.publish("apple");
    for (error, said) in [
        // 0: the server has died.
        (0, libc::ENOTCONN),
        (libc::EIO, libc::EIO),
        (libc::ETIMEDOUT, libc::ETIMEDOUT),
        (libc::EHOSTDOWN, libc::EHOSTDOWN),
        (libc::ESTALE, libc::ESTALE),
    ] {
        for command in [&on_mount, &script, &by_env, "worker"] {
            let start = worker(&queue).env("PATH", &path).args(["--", command]);
            with_fuse(start, error, &mount)
                .run()
                .assert_status(71)
                .assert_stderr("can't be opened: ")
                // The error's text differs between glibc and musl.
                .assert_stderr(&format!("(os error {said}); its mount"))
                .assert_stderr("its mount doesn't answer on this node, another try may help");
        }
        let got = queue.get().expect("the message is still there");
        assert!(!got.redelivered, "the message was taken");
        // A later folder in PATH has it.
        queue.publish("apple");
        let start = worker(&queue).env("PATH", &path).args(["--", "cat"]);
        let done = with_fuse(start, error, &mount).run();
        done.assert_status(0);
        assert_eq!(done.stdout_text(), "apple");
        queue.publish("apple");
    }
    // Error 2 (ENOENT) is an ordinary missing file.
    let start = worker(&queue).env("PATH", &path).args(["--", "worker"]);
    with_fuse(start, 2, &mount).run().assert_status(127).assert_stderr("worker is in none of the folders of PATH");
}

#[test]
fn what_forbids_execution_is_named() {
    let folder = temp_folder("forbidden");
    let mount = folder.join("mount");
    fs::create_dir(&mount).unwrap();
    let in_mount = |program: Program| {
        let script = "mount -t tmpfs -o noexec none \"$0\" && cp script \"$0\" && exec \"$@\"";
        let through = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script];
        program.current_dir(&folder).through(through).through([&mount])
    };
    executable(folder.join("script"), "#!/bin/sh\n");
    if !owner::is_root()
        || owner::find_in_path("setpriv").is_none()
        || in_mount(Program::new("true")).run().status() != 0
    {
        return missing("root, setpriv, unshare and tmpfs");
    }
    let queue = Broker::shared().queue("forbidden");
    queue.publish("apple");
    let on_mount = mount.join("script");
    let by_script = executable(folder.join("by-script"), &format!("#!{}\n", on_mount.display()));
    for command in [&on_mount, &by_script.into()] {
        let done = in_mount(worker(&queue).arg("--").arg(command)).run();
        done.assert_status(126).assert_stderr("is on a mount that forbids execution (noexec)");
        assert!(!done.stderr.contains("execute bit"), "{}", done.stderr);
    }

    // The file or its folder belongs to another user, and only the owner may execute or enter it.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).unwrap();
    let program = folder.join("qconsume");
    fs::copy(crate::common::qconsume_path(), &program).unwrap();
    fs::create_dir(folder.join("closed")).unwrap();
    fs::set_permissions(folder.join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    executable(folder.join("closed/script"), "#!/bin/sh\n");
    fs::set_permissions(folder.join("script"), fs::Permissions::from_mode(0o700)).unwrap();
    for (command, says) in [
        ("./script", "may not be executed by this user: its mode is 700, its owner 0"),
        ("./closed/script", "can't be opened: Permission denied (os error 13); this user may not enter one of"),
    ] {
        Program::new(&program)
            .url(&Broker::shared().url())
            .queue(queue.name())
            .current_dir(&folder)
            .args(["--", command])
            .through(["setpriv", "--reuid=65534", "--clear-groups"])
            .run()
            .assert_status(126)
            .assert_stderr(says);
    }
    assert!(!queue.get().expect("the message is still there").redelivered, "the message was taken");
}
