//! Programs under test, networks without packets, and what is left when a test process is killed.

use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::Duration;
use testbed::{Broker, Direction, Method, Netns, PATIENCE, Program, Proxy, Signal, missing, owner};

#[test]
fn statuses_and_output_are_kept_apart() {
    let finished = Program::new("sh")
        .stdin("abc")
        .args(["-c", "cat; echo err >&2; exit 3"])
        .run();
    assert_eq!(
        (finished.code, finished.stdout_text().as_str()),
        (Some(3), "abc")
    );
    finished.assert_status(3).assert_stderr("err");

    let running = Program::new("sh")
        .args(["-c", "echo ready >&2; exec sleep 1000"])
        .spawn();
    running.wait_for_stderr("ready", PATIENCE);
    running.signal(Signal::SIGTERM);
    let finished = running.wait(PATIENCE);
    assert_eq!((finished.signal, finished.status()), (Some(15), 143));
}

#[test]
fn a_hang_is_a_panic_and_leaves_nothing() {
    let running = Program::new("sh")
        .args(["-c", "sleep 1000 & echo started; wait"])
        .spawn();
    running.wait_for_stdout("started", PATIENCE);
    let pids = running.leftovers();
    assert_eq!(pids.len(), 1);
    let hang = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        running.finish(Duration::from_millis(100))
    }));
    assert!(hang.is_err());
    running.wait_no_leftovers(PATIENCE);
}

#[test]
fn the_hosts_variables_are_removed() {
    let shown = Program::new("env")
        .url("amqp://there")
        .env("QCONSUME_WAIT", "1s")
        .run()
        .stdout_text();
    assert!(
        shown.contains("BROKER_URL=amqp://there\n") && shown.contains("QCONSUME_WAIT=1s\n"),
        "{shown}"
    );
    let cleared = Program::new("/usr/bin/env").env_clear().run().stdout_text();
    assert!(!cleared.contains("PATH="), "{cleared}");
}

#[test]
fn a_namespace_can_lose_its_packets() {
    if !Netns::available() {
        return missing("root, and the right to create network namespaces");
    }
    let netns = Netns::new();
    let proxy = Proxy::listen(netns.host_ip().into(), None).expect("a proxy");
    let connect = || {
        let script = format!(
            "exec 3<>/dev/tcp/{}/{} && echo connected >&2",
            proxy.addr().ip(),
            proxy.addr().port()
        );
        netns
            .enter(Program::new("bash").args(["-c", &script]))
            .spawn()
    };
    connect()
        .wait(PATIENCE)
        .assert_status(0)
        .assert_stderr("connected");
    netns.drop_packets();
    let running = connect();
    assert!(!testbed::eventually(Duration::from_millis(1500), || {
        running.has_ended()
    }));
    netns.pass_packets();
    running
        .wait(PATIENCE)
        .assert_status(0)
        .assert_stderr("connected");
}

#[test]
fn a_namespace_reaches_a_private_broker_through_a_proxy() {
    if !Netns::available() {
        return missing("root, and the right to create network namespaces");
    }
    let netns = Netns::new();
    let broker = Broker::shared();
    let proxy = Proxy::listen(netns.host_ip().into(), Some(broker.addr())).expect("a proxy");
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; printf 'AMQP\\0\\0\\11\\1' >&3; head -c 1 <&3 >/dev/null",
        netns.host_ip(),
        proxy.addr().port()
    );
    netns
        .enter(Program::new("bash").args(["-c", &script]))
        .run()
        .assert_status(0);
    proxy.wait_for(Direction::ToClient, Method::CONNECTION_START, PATIENCE);
}

/// What the next test kills: it has a broker, a program and a folder, and says so.
#[test]
#[ignore = "run by a_killed_test_process_leaves_nothing"]
fn owner_of_everything() {
    let broker = Broker::start();
    let running = Program::new("sh")
        .args(["-c", "sleep 1000 & sleep 1000"])
        .spawn();
    let folder = owner::temp_folder("left");
    let _netns = Netns::available().then(Netns::new);
    println!(
        "\nowner={} folder={} pid={}",
        owner::id(),
        folder.display(),
        running.pid()
    );
    drop(broker.queue("x"));
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_test_process_leaves_nothing() {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["owner_of_everything", "--ignored", "--exact", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test again");
    let output = std::io::BufReader::new(child.stdout.take().expect("its output"));
    let line = output
        .lines()
        .map_while(Result::ok)
        .find(|line| line.starts_with("owner="))
        .expect("it says what it has");
    let values: Vec<&str> = line
        .split(' ')
        .filter_map(|word| Some(word.split_once('=')?.1))
        .collect();
    let (id, folder) = (values[0], std::path::Path::new(values[1]));
    // The emulator, its port mapper and helpers, three shells and sleeps.
    assert!(owner::processes_with(owner::MARK, id).len() >= 5);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    let namespaces = || {
        Command::new("ip")
            .args(["netns", "list"])
            .output()
            .map_or_else(
                |_| String::new(),
                |out| String::from_utf8_lossy(&out.stdout).into_owned(),
            )
    };
    assert!(
        testbed::eventually(PATIENCE, || {
            owner::processes_with(owner::MARK, id).is_empty()
                && !folder.parent().expect("the owner's").exists()
                && !namespaces().contains(id)
        }),
        "left: {:?} {}",
        owner::processes_with(owner::MARK, id),
        folder.display()
    );
}
