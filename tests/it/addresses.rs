//! Addresses, from outside: what is meant is what is reached, and what is malformed is told in one line without the
//! secret. The whole table of cases is beside the parser.

use crate::common::{User, Vhost, private_broker, qconsume, qpublish};
use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener},
    thread,
    time::Duration,
};
use testbed::{Broker, Finished, FullBacklog, Network, Program, Proxy, Queue, missing, owner::temp_folder};

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

/// The name that has several addresses.
const NAME: &str = "broker.test";

/// The broker's address, far from the others: a resolver that sorts addresses (RFC 6724) prefers those that begin as the
/// source address does, 127.0.0.1.
const HEALTHY: &str = "127.200.0.1";

/// IPv6 without a route to it.
const UNREACHABLE: &str = "2001:db8::1";

/// Addresses of one name, in a network of the test's own.
struct Addresses {
    network: Network,
    broker: Proxy,
    port: u16,
}

impl Addresses {
    /// `None` if this machine doesn't let a test have a network.
    fn new() -> Option<Self> {
        let network = match Network::new() {
            Ok(network) => network,
            Err(error) => {
                missing(&format!("a network namespace ({error:#})"));
                return None;
            }
        };
        let upstream = Broker::shared().addr();
        let broker = network.inside(|| Proxy::listen(HEALTHY.parse().unwrap(), Some(upstream))).unwrap();
        let port = broker.addr().port();
        Some(Self { network, broker, port })
    }

    fn at(&self, ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), self.port)
    }

    /// Lets these addresses drop what they get.
    fn silence(&self, ips: &[impl AsRef<str>]) -> Vec<FullBacklog> {
        let starting = |ip| {
            let address = self.at(ip);
            move || self.network.inside(|| FullBacklog::at(address))
        };
        thread::scope(|scope| {
            let starting: Vec<_> = ips.iter().map(|ip| scope.spawn(starting(ip.as_ref()))).collect();
            starting.into_iter().map(|starting| starting.join().unwrap()).collect()
        })
    }

    /// Takes a message from the queue, from the broker that has this name.
    ///
    /// One of the addresses should be IPv6: otherwise what the build has left asks name servers for one, and there are none.
    fn worker(&self, queue: &Queue, ips: &[impl AsRef<str>], limit: &str) -> Finished {
        self.worker_with("", queue, ips, limit)
    }

    /// The same with these parameters of the URL.
    fn worker_with(&self, parameters: &str, queue: &Queue, ips: &[impl AsRef<str>], limit: &str) -> Finished {
        let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.as_ref().parse().unwrap()).collect();
        self.network.name(NAME, &ips);
        let url = queue.url().replace(&Broker::shared().addr().to_string(), &format!("{NAME}:{}", self.port));
        let program = qconsume().url(&(url + parameters)).queue(queue.name()).args(["--connect-timeout", limit, "cat"]);
        program.through(self.network.prefix()).run()
    }
}

/// Checks that it was done, and within its first attempt.
#[track_caller]
fn assert_done_at_once(done: &Finished, ips: &[impl AsRef<str> + std::fmt::Debug]) {
    let said = format!("{ips:?}, after {:?}: {}", done.wall, done.stderr);
    assert_eq!(done.status(), 0, "{said}");
    assert_eq!(done.stdout_text(), "x", "{said}");
    assert!(!done.stderr.contains("trying again"), "{said}");
}

#[test]
fn silent_addresses_do_not_hold_up_a_healthy_one() {
    let Some(addresses) = Addresses::new() else { return };
    let queue = Broker::shared().queue("silent-addresses");
    let many: Vec<String> = (2..17).map(|last| format!("127.0.0.{last}")).collect();
    let _silent = (addresses.silence(&many), addresses.silence(&["::1"]));
    // So many that at a quarter of a second for each the last case's time would be over before the last address.
    for (silent, limit) in [(1, "10s"), (7, "10s"), (15, "3s")] {
        for ipv6 in ["::1", UNREACHABLE] {
            let ips = [&[ipv6.to_owned()][..], &many[..silent], &[HEALTHY.to_owned()]].concat();
            queue.publish("x");
            let done = addresses.worker(&queue, &ips, limit);
            assert_done_at_once(&done, &ips);
            assert!(done.wall < Duration::from_secs(5), "{ips:?}: {:?}", done.wall);
        }
    }
}

#[test]
fn an_address_that_refuses_a_silent_one_and_a_healthy_one_are_one_attempt() {
    let Some(addresses) = Addresses::new() else { return };
    let queue = Broker::shared().queue("refusing-address");
    let _silent = addresses.silence(&["127.0.0.2"]);
    for ips in [
        ["::1", "127.0.0.2", "127.0.0.3", HEALTHY],
        ["127.0.0.3", "127.0.0.2", HEALTHY, UNREACHABLE],
        ["127.0.0.2", "127.0.0.3", "::1", HEALTHY],
    ] {
        queue.publish("x");
        assert_done_at_once(&addresses.worker(&queue, &ips, "10s"), &ips);
    }
    // The others were dropped before they could be accepted.
    assert_eq!(addresses.broker.accepted(), 3);
}

#[test]
fn the_last_line_names_each_address_and_what_it_said() {
    let Some(addresses) = Addresses::new() else { return };
    let queue = Broker::shared().queue("no-address");
    let _silent = addresses.silence(&["127.0.0.2", "127.0.0.3", "::1"]);
    let port = addresses.port;
    let [second, third, sixth] = [format!("127.0.0.2:{port}"), format!("127.0.0.3:{port}"), format!("[::1]:{port}")];
    let ips = ["127.0.0.2", "127.0.0.3", "::1", UNREACHABLE, "127.0.0.4"];
    for (parameters, says) in [
        ("", "no answer while connecting to ".to_owned()),
        ("?connection_timeout=300", format!("{second}: no answer within 300ms")),
    ] {
        let done = addresses.worker_with(parameters, &queue, &ips, "2s");
        done.assert_status(69).assert_stderr("gave up after 2s (--connect-timeout): amqp://");
        let last = done.stderr.lines().last().unwrap();
        assert!(last.contains(&says), "{last}");
        for address in [&second, &third, &sixth] {
            assert!(last.contains(address), "{address}: {last}");
        }
        assert!(last.contains(&format!("127.0.0.4:{port}: Connection refused")), "{last}");
        assert!(last.contains(&format!("[{UNREACHABLE}]:{port}: ")), "{last}");
    }
}

/// As a broker that is stopped or frozen: its system accepts, and nobody reads.
#[test]
fn after_an_address_that_accepts_and_stays_silent_the_others_are_tried_first() {
    let Some(addresses) = Addresses::new() else { return };
    let queue = Broker::shared().queue("frozen-address");
    let frozen = addresses.at("127.0.0.2");
    let listener = addresses.network.inside(|| TcpListener::bind(frozen)).unwrap();
    let says = format!("no answer while waiting for the AMQP handshake with {frozen}");
    queue.publish("x");
    let done = addresses.worker(&queue, &["127.0.0.2", "::1", HEALTHY], "12s");
    done.assert_status(0).assert_stderr(&says);
    assert_eq!(done.stdout_text(), "x");
    // Without another that accepts it is the only hope, and the last line tells of all of them.
    let _silent = addresses.silence(&["127.0.0.3"]);
    let done = addresses.worker(&queue, &["127.0.0.2", "::1", "127.0.0.3"], "12s");
    done.assert_status(69).assert_stderr(&says);
    let last = done.stderr.lines().last().unwrap();
    for said in [
        says,
        format!("; [::1]:{}: Connection refused", addresses.port),
        format!("; {}: no answer", addresses.at("127.0.0.3")),
    ] {
        assert!(last.contains(&said), "{said}: {last}");
    }
    drop(listener);
}
