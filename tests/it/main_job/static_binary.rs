//! The static binary: it needs no library, and it looks up names even if the image has a newer C library.

use std::{fs, process};
use testbed::{Finished, Program, docker_works, emulator_lacks, image_present, missing, owner};

/// Of the tests' images, the one with the newest C library.
const IMAGE: &str = "rabbitmq:4.3-management";

/// The program header that names a dynamic loader (`PT_INTERP` of elf(5)).
const INTERPRETER: u32 = 3;

#[test]
fn the_binary_asks_for_no_dynamic_loader() {
    if emulator_lacks("a file that is the program itself (tests/arm64 looks into it)") {
        return;
    }
    let file = fs::read(crate::common::qconsume_path()).unwrap();
    assert_eq!(file[..5], *b"\x7fELF\x02", "no 64-bit ELF");
    let number = |at: usize, bytes: usize| {
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(&file[at..at + bytes]);
        u64::from_le_bytes(all) as usize
    };
    // e_phoff, e_phentsize and e_phnum.
    let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let types = (0..count).map(|index| number(start + index * size, 4) as u32);
    assert!(types.clone().any(|kind| kind == 1), "the binary has no segment to load");
    assert!(!types.clone().any(|kind| kind == INTERPRETER), "the binary needs a dynamic loader");
}

/// A Docker network, in which Docker runs a name server; removed when dropped.
struct Network(String);

impl Network {
    fn new(label: &str) -> Self {
        let name = format!("qconsume-names-{}", process::id());
        docker(&["network", "create", "--label", label, &name]).assert_status(0);
        Self(name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        docker(&["network", "rm", &self.0]);
    }
}

fn docker(arguments: &[&str]) -> Finished {
    let docker = owner::find_in_path("docker").expect("docker is in PATH");
    Program::new(docker).args(arguments).run()
}

#[test]
fn names_are_looked_up_in_an_image_with_a_newer_c_library() {
    if emulator_lacks("a file that is the program itself") {
        return;
    }
    if !docker_works() || !image_present(IMAGE) {
        return missing(&format!("Docker and the image {IMAGE}"));
    }
    let label = owner::docker_label().unwrap();
    let network = Network::new(&label);
    let folder = owner::temp_folder("names");
    let nsswitch = folder.join("nsswitch.conf");
    fs::write(&nsswitch, "hosts: files myhostname resolve dns\n").unwrap();
    // Nothing listens on these addresses: a refused connection to the right one shows that the name was found.
    let names = [
        ("broker.test", "127.9.8.7:5672: Connection refused"),
        ("by-dns", ":5672: Connection refused"),
        ("by-dns.qconsume.test", ":5672: Connection refused"),
        ("localhost", "127.0.0.1:5672: Connection refused"),
        ("own-name", ":5672: Connection refused"),
        ("no-such-name", "\"no-such-name\" can't be looked up"),
    ];
    // All at the same time, as each run takes until its limit.
    let script = "cd /tmp; for name; do {
            /qconsume --url amqp://$name --queue q --connect-timeout 10s true
            echo \"$name: $?\"
        } >said-$name 2>&1 & done
        wait; for name; do cat said-$name; done";
    let name = format!("qconsume-names-{}", process::id());
    let options = [
        format!("--name={name}"),
        format!("--label={label}"),
        format!("--network={}", network.0),
        "--network-alias=by-dns".to_owned(),
        "--network-alias=by-dns.qconsume.test".to_owned(),
        "--hostname=own-name".to_owned(),
        "--add-host=broker.test:127.9.8.7".to_owned(),
        "--entrypoint=sh".to_owned(),
    ];
    let mut create = vec!["create"];
    create.extend(options.iter().map(String::as_str));
    create.extend([IMAGE, "-c", script, "sh"]);
    create.extend(names.map(|(name, _)| name));
    docker(&create).assert_status(0);
    // Copied, not mounted: the daemon may be on another machine.
    for (file, to) in [(crate::common::qconsume_path(), "/qconsume"), (nsswitch, "/etc/nsswitch.conf")] {
        let file = file.to_str().unwrap();
        docker(&["cp", file, &format!("{name}:{to}")]).assert_status(0);
    }
    let said = docker(&["start", "--attach", &name]).stdout_text();
    docker(&["rm", "-f", "-v", &name]);
    let mut rest = said.as_str();
    for (name, says) in names {
        let Some((run, after)) = rest.split_once(&format!("{name}: 69\n")) else {
            panic!("{name} did not end with 69:\n{said}");
        };
        assert!(run.contains(says), "{name} lacks {says:?}:\n{said}");
        rest = after;
    }
}
