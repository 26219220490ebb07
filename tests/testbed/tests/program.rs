//! Programs under test, and the cleaning up after a killed test process.

use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::Duration;
use testbed::{Broker, PATIENCE, Program, Signal, owner};

#[test]
fn statuses_and_output_are_kept_apart() {
    let finished = Program::new("sh").stdin("abc").args(["-c", "cat; echo err >&2; exit 3"]).run();
    assert_eq!((finished.code, finished.stdout_text().as_str()), (Some(3), "abc"));
    finished.assert_status(3).assert_stderr("err");

    let running = Program::new("sh").args(["-c", "echo ready >&2; exec sleep 1000"]).spawn();
    running.wait_for_stderr("ready", PATIENCE);
    running.signal(Signal::SIGTERM);
    let finished = running.wait(PATIENCE);
    assert_eq!((finished.signal, finished.status()), (Some(15), 143));
}

#[test]
fn a_hang_is_a_panic_and_leaves_nothing() {
    let running = Program::new("sh").args(["-c", "sleep 1000 & echo started; wait"]).spawn();
    running.wait_for_stdout("started", PATIENCE);
    let pids = running.leftovers();
    assert_eq!(pids.len(), 1);
    let hang = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| running.finish(Duration::from_millis(100))));
    assert!(hang.is_err());
    running.wait_no_leftovers(PATIENCE);
}

#[test]
fn the_tests_own_variables_are_removed() {
    let shown = Program::new("env").url("amqp://there").env("QCONSUME_WAIT", "1s").run().stdout_text();
    assert!(shown.contains("BROKER_URL=amqp://there\n") && shown.contains("QCONSUME_WAIT=1s\n"), "{shown}");
}

#[test]
fn a_program_has_the_usual_signals_even_under_nohup() {
    let finished = Program::new("sh")
        .args(["-c", "kill -HUP $$; exit 3"])
        .through(["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .run();
    // `through` applies after the reset.
    assert_eq!(finished.status(), 3);
    let usual = Program::new("sh").args(["-c", "kill -HUP $$; exit 3"]).run();
    assert_eq!(usual.signal, Some(1));
}

#[test]
fn processes_that_it_leaves_behind_do_not_delay_its_output() {
    let running = Program::new("sh").args(["-c", "sleep 1000 & seq 100000; echo last >&2"]).spawn();
    let finished = running.finish(PATIENCE);
    finished.assert_status(0).assert_stderr("last");
    assert!(finished.stdout_text().ends_with("\n100000\n"));
    assert_eq!(running.leftovers().len(), 1);
}

#[test]
fn a_process_is_found_also_while_it_executes_another_program() {
    let running =
        Program::new("sh").args(["-c", "(exec sh -c \"$0\" \"$0\") & wait", "exec sh -c \"$0\" \"$0\""]).spawn();
    assert!(testbed::eventually(PATIENCE, || !running.leftovers().is_empty()));
    for look in 0..500 {
        assert_eq!(running.leftovers().len(), 1, "look {look}");
    }
}

/// The process that the next test kills: it has a broker, a program and a folder, and prints their names.
#[test]
#[ignore = "run by a_killed_test_process_leaves_nothing"]
fn owner_of_everything() {
    let broker = Broker::start();
    let running = Program::new("sh").args(["-c", "sleep 1000 & sleep 1000"]).spawn();
    let folder = owner::temp_folder("left");
    println!("\nowner={} folder={} pid={}", owner::id(), folder.display(), running.pid());
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
    let line =
        output.lines().map_while(Result::ok).find(|line| line.starts_with("owner=")).expect("a line with its names");
    let values: Vec<&str> = line.split(' ').filter_map(|word| Some(word.split_once('=')?.1)).collect();
    let (id, folder) = (values[0], std::path::Path::new(values[1]));
    // The emulator, its port mapper and helpers, and three shells and sleeps.
    assert!(owner::processes_with(owner::MARK, id).len() >= 5);
    child.kill().expect("killed");
    child.wait().expect("reaped");
    assert!(
        testbed::eventually(PATIENCE, || {
            owner::processes_with(owner::MARK, id).is_empty() && !folder.parent().expect("the owner's").exists()
        }),
        "left: {:?} {}",
        owner::processes_with(owner::MARK, id),
        folder.display()
    );
}
