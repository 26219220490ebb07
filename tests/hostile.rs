//! A peer that breaks AMQP. A test program of its own: the kernel counts a program's memory from that of the process
//! that started it, and this one stays small.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::{thread, time::Duration};
use testbed::peer::{consumer_tag, delivery, nested, usual};
use testbed::{Answer, Finished, Method, Peer, Program, hostile};

const CASES: usize = 1000;

/// Nearly all of the time each of them waits for something.
const AT_ONCE: usize = 40;

/// A case takes three seconds at most.
const HANG: Duration = Duration::from_secs(20);

/// The most memory that qconsume may have resident; the bodies are small.
const MEMORY: u64 = 64 * 1024 * 1024;

/// The statuses that a peer, and a command that succeeds, can bring about.
const DOCUMENTED: [i32; 7] = [0, 66, 69, 70, 75, 77, 78];

/// The variable that gives the seed of the first case, and how many there are: `SEED` or `SEED:CASES`.
const SEED: &str = "QCONSUME_TEST_SEED";

fn qconsume() -> Program {
    let built = env!("CARGO_BIN_EXE_qconsume");
    let path = std::env::var_os("QCONSUME_BIN");
    Program::new(path.as_deref().unwrap_or(built.as_ref()))
}

fn run(peer: &Peer) -> Finished {
    qconsume()
        .url(&peer.url())
        .queue("orders")
        .args(["--connect-timeout", "1s", "--wait", "500ms"])
        .args(["--heartbeat", "1", "true"])
        .spawn()
        .wait(HANG)
}

/// What is wrong with how it has ended, if anything.
fn wrong(done: &Finished) -> Option<String> {
    let status = done.status();
    let last = done.stderr.lines().last().unwrap_or_default();
    if !DOCUMENTED.contains(&status) {
        return Some(format!("status {status}"));
    }
    if done.stderr.contains("panicked") || done.stderr.contains("defect") {
        return Some("a panic".to_owned());
    }
    if status != 0 && !last.starts_with("qconsume: ") {
        return Some(format!("no last line: {last:?}"));
    }
    (done.peak_memory > MEMORY).then(|| format!("{} bytes resident", done.peak_memory))
}

/// Seed and number of cases.
fn cases() -> (u64, usize) {
    let Ok(text) = std::env::var(SEED) else {
        return (fastrand::u64(..1 << 48), CASES);
    };
    let (seed, cases) = text.split_once(':').unwrap_or((&text, "1"));
    let number = |text: &str| text.parse::<u64>().expect("a number");
    (number(seed), number(cases) as usize)
}

#[test]
fn a_peer_that_breaks_amqp_at_random_brings_about_a_documented_status() {
    let (seed, cases) = cases();
    println!("{SEED}={seed}:{cases}");
    let next = AtomicUsize::new(0);
    let work = || {
        let mut failures = Vec::new();
        loop {
            let case = next.fetch_add(1, Ordering::Relaxed);
            if case >= cases {
                return failures;
            }
            let seed = seed + case as u64;
            let peer = hostile::peer(seed);
            // A hang panics; it is to name its seed, too.
            let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&peer)));
            match run {
                Err(_) => {
                    let calls = peer.calls();
                    let seen: Vec<_> = calls.iter().map(|call| call.method).collect();
                    failures.push(format!("{SEED}={seed}: a hang; the peer was sent {seen:?}"));
                }
                Ok(done) => failures.extend(
                    wrong(&done).map(|why| format!("{SEED}={seed}: {why}\n{}", done.stderr)),
                ),
            }
        }
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let results = workers.into_iter().map(|worker| worker.join());
        results
            .flat_map(|result| result.expect("no panic"))
            .collect()
    });
    assert!(
        failures.is_empty(),
        "{} of {cases} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn headers_that_are_nested_a_thousand_deep_are_70_with_the_way_out() {
    for arrays in [false, true] {
        let peer = Peer::start(move |call| match call.method {
            Method::BASIC_CONSUME => {
                let headers = nested(1000, arrays);
                let frames = delivery(call.channel, &consumer_tag(call), &headers, 2, b"ok");
                Answer::Bytes([usual(call), frames.concat()].concat())
            }
            _ => Answer::Usual,
        });
        let done = run(&peer);
        done.assert_status(70);
        let last = done.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("\"orders\""), "{}", done.stderr);
        // How to get it out of the queue.
        assert!(
            last.contains("amqp-get")
                || last.contains("rabbitmqadmin")
                || last.contains("management"),
            "{last}"
        );
        assert!(done.wall < Duration::from_secs(10), "{:?}", done.wall);
    }
}
