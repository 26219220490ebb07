//! Addresses, from outside: what is meant is what is reached, and what is malformed is told in one line without the
//! secret. The whole table of cases is beside the parser.

use crate::common::{User, Vhost, private_broker, qconsume, qpublish};
use std::fs;
use testbed::{Broker, Program, Proxy, Queue, missing, owner::temp_folder};

/// What every malformed address below has for a password, or a piece of it.
const SECRET: &str = "hunter2";

#[test]
fn a_malformed_address_is_told_in_one_line_without_the_secret() {
    let table = [
        ("", "the URL is empty"),
        ("hunter2", "must start with amqp:// or amqps://"),
        ("http://u:hunter2@h", "must start with amqp:// or amqps://"),
        ("amqp:/u:hunter2@h", "must start with amqp:// or amqps://"),
        (" amqp://u:hunter2@h", "starts with a blank"),
        ("amqp://u:hunter2@h ", "ends with a blank"),
        ("amqp://u:hunter2@h\n\n", "ends with a blank, a newline"),
        ("amqp://u:hun ter2@h", "contains a blank"),
        ("amqp://u:hunter2#@h", "contains a '#'"),
        ("amqp://u:hunter2/3@h", "an '@' after the first '/'"),
        ("amqp://u:hunter2?3@h", "an '@' after the first '/' or '?'"),
        ("amqp://u:hunter2@3@h", "more than one '@'"),
        ("amqp://u:hunter2%@h", "the password contains a '%'"),
        ("amqp://u:hunter2%zz@h", "the password contains a '%'"),
        ("amqp://u:hunter2%ff@h", "the password is not UTF-8"),
        ("amqp://%ff:hunter2@h", "the user name is not UTF-8"),
        ("amqp://u:hunter2@%ff", "the host is not UTF-8"),
        ("amqp://u:hunter2@h/%ff", "the virtual host is not UTF-8"),
        ("amqp://u:hunter2@h/a/b", "the virtual host contains a '/'"),
        ("amqp://u:hunter2@h:x", "the port must be a number"),
        ("amqp://u:hunter2@h:0", "the port must be a number"),
        ("amqp://u:hunter2@h:65536", "the port must be a number"),
        ("amqp://u:hunter2@h:", "the port must be a number"),
        ("amqp://u:hunter2@::1", "square brackets"),
        ("amqp://u:hunter2@[::1", "has no ']'"),
        ("amqp://u:hunter2@[h]", "not an IPv6 address"),
        ("amqp://u:hunter2@[::1]x", "may follow the host's square brackets"),
        ("amqp://u:hunter2@a,b", "the host contains a ','"),
        ("amqp://u:hunter2@h?hunger=2", "the query parameter hunger is unknown"),
        ("amqp://u:hunter2@h?heartbeat=x", "the query parameter heartbeat"),
        ("amqp://u:hunter2@h?heartbeat=1&heartbeat=2", "is there twice"),
        ("amqp://u:hunter2@h?cacertfile=x", "needs TLS"),
        ("amqps://u:hunter2@h?verify=verify_none", "is always checked"),
        ("amqp://u:hunter2@a,amqp://u:hunter2@b:x", "URL 2 of 2: the port"),
    ];
    let folder = temp_folder("urls");
    for (index, (url, text)) in table.into_iter().enumerate() {
        let file = folder.join(index.to_string());
        fs::write(&file, url).unwrap();
        let program = || qconsume().args(["-q", "q"]);
        for (program, source) in [
            (program().url(url), "BROKER_URL"),
            (program().arg(format!("--url={url}")), "--url"),
            (program().env("BROKER_URL_FILE", &file), "BROKER_URL_FILE"),
        ] {
            let ended = program.args(["--log-level=debug", "cat"]).run();
            ended.assert_status(64);
            let last = ended.stderr.lines().last().unwrap();
            assert!(last.starts_with("qconsume: error: "), "{url:?}: {last}");
            assert!(last.contains(&format!("{source}: ")), "{url:?}: {last}");
            assert!(last.contains(text), "{url:?}: {last}");
            for piece in [SECRET, "ter2"] {
                assert!(!ended.stderr.contains(piece), "{url:?}: {}", ended.stderr);
            }
        }
    }
}

#[test]
fn an_address_in_anothers_place_is_told_without_the_secret() {
    let url = "amqp://u:hunter2@127.0.0.1:1";
    for variable in ["BROKER_URL_FILE", "QUEUE", "QCONSUME_CACERT", "QCONSUME_SERVER"] {
        for program in [qconsume(), qpublish()] {
            let ended = program.env(variable, url).arg("cat").run();
            ended
                .assert_status(64)
                .assert_stderr(&format!("{variable} is an amqp:// address"))
                .assert_stderr("BROKER_URL or --url");
            assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
        }
    }
    let mistakes: [(Program, &str); 4] = [
        (qconsume().args(["--url-file", url, "cat"]), "--url-file"),
        (qconsume().args(["-q", url, "cat"]), "--queue"),
        (qpublish().args(["-q", "q", "-f", "x", url]), "--file"),
        (qpublish().args(["-q", "q", "-r", &format!(" {url}")]), "--routing-key"),
    ];
    for (program, option) in mistakes {
        let ended = program.run();
        ended.assert_status(64).assert_stderr(&format!("{option} is an amqp:// address"));
        assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
    }
}

#[test]
fn an_address_that_is_not_text_is_a_usage_error() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let bytes = OsStr::from_bytes(b"amqp://u:hunter2@\xff");
    let ended = qconsume().env("BROKER_URL", bytes).args(["-q", "q", "cat"]).run();
    ended.assert_status(64);
    assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
    let ended = qconsume().env("AMQP_URL", bytes).args(["-q", "q", "cat"]).run();
    ended.assert_status(64).assert_stderr("AMQP_URL isn't UTF-8");
    assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
}

/// Takes a message over this address.
#[track_caller]
fn takes(url: &str, queue: &Queue) {
    queue.publish("x");
    let ended = qconsume().url(url).queue(queue.name()).args(["--", "cat"]).run();
    ended.assert_status(0);
    assert_eq!(ended.stdout_text(), "x", "{url}");
}

#[test]
fn the_same_broker_is_reached_by_every_way_to_write_its_address() {
    let broker = Broker::shared();
    let queue = broker.queue("addresses");
    let url = broker.url();
    let (head, host) = url.rsplit_once('@').unwrap();
    takes(&format!("{url}\n"), &queue);
    takes(&url.replace("amqp://", "AMQP://"), &queue);
    takes(&format!("{url}?heartbeat=7&connection_timeout=2000"), &queue);
    // The nodes of a cluster: the first is down.
    takes(&format!("amqp://127.0.0.1:1,{url}"), &queue);
    takes(&format!("amqp://a,b:x,y@127.0.0.1:1,{url}"), &queue);
    if !host.contains('/') {
        takes(&format!("{url}/"), &queue);
        takes(&format!("{url}/%2f"), &queue);
        takes(&format!("{url}/%2F?"), &queue);
        // Celery's, and with pika's, kombu's and amqp091-go's parameters.
        takes(&format!("{url}//"), &queue);
        takes(
            &format!("{url}//?blocked_connection_timeout=300&failover_strategy=shuffle&channel_max=9&heartbeat=0"),
            &queue,
        );
    }
    if url.starts_with("amqp://guest:guest@") {
        takes(&format!("amqp://{host}"), &queue);
        takes(&format!("amqp://guest@{host}"), &queue);
        takes(&format!("amqp://%67uest:gu%65st@{host}"), &queue);
    }
    let file = temp_folder("url").join("url");
    fs::write(&file, format!("{url}\n")).unwrap();
    queue.publish("x");
    qconsume().env("BROKER_URL_FILE", &file).args(["-q", queue.name(), "cat"]).run().assert_status(0);
    // IPv6.
    let Ok(proxy) = Proxy::listen("::1".parse().unwrap(), Some(broker.addr())) else {
        missing("IPv6");
        return;
    };
    takes(&format!("{head}@{}", proxy.addr()), &queue);
    takes(&format!("{head}@[::1%25lo]:{}", proxy.addr().port()), &queue);
}

#[test]
fn other_clients_parameters_are_named_at_debug_level_only() {
    let url = "amqp://127.0.0.1:1/?blocked_connection_timeout=300&heartbeat=5";
    let run = |level| {
        let program = qconsume().url(url).queue("q").args(["--log-level", level]);
        let ended = program.args(["--connect-timeout=10ms", "cat"]).run();
        ended.assert_status(69);
        ended.stderr.matches("blocked_connection_timeout").count()
    };
    assert_eq!((run("info"), run("debug")), (0, 1));
}

#[test]
fn any_user_password_and_virtual_host_can_be_written() {
    let broker = private_broker();
    let (name, password) = ("wörker@/:?#", "p@ss/wörd:%?#[],amqp://");
    let user = User::new(&broker, name, password);
    let vhost = Vhost::new(&broker, "/a b/ü%2f").of(name);
    // There is no queue there, which it can only know from inside.
    let ended = qconsume().url(&user.url(vhost.name)).args(["-d", "-q", "addresses", "--wait=0", "cat"]).run();
    ended.assert_status(66).assert_stderr("declared queue");
    // The same from parts, which need no encoding.
    let ended = qconsume()
        .env("QCONSUME_PASSWORD", password)
        .args(["--server", &broker.addr().to_string()])
        .args(["--username", name, "--vhost", vhost.name])
        .args(["-q", "addresses", "--wait=0", "cat"])
        .run();
    ended.assert_status(66);
    // What is wrong with the login is told without the password, and who and where is told.
    let ended = qconsume()
        .url(&broker.url_for(name, SECRET, vhost.name))
        .args(["--log-level=debug", "-q", "addresses", "cat"])
        .run();
    ended.assert_status(77).assert_stderr("wörker@/:?#");
    assert!(!ended.stderr.contains(SECRET), "{}", ended.stderr);
}
