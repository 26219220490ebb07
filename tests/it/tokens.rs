//! OAuth 2 tokens instead of passwords, on a RabbitMQ with its OAuth 2 plugin: tokens that are renewed in time, or
//! aren't.

use crate::common::{MESSAGE, assert_back, assert_gone, qconsume, qpublish, until_there};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, SystemTime},
};
use testbed::{
    Action, Broker,
    Direction::{ToBroker, ToClient},
    Finished, Method, PATIENCE, Program, Proxy, Queue, Running,
    owner::temp_folder,
    tokens::Issuer,
    version_lacks,
};

/// How long a token is valid: longer than qconsume takes to find a new one, even on a busy machine.
const LIFE: Duration = Duration::from_secs(12);

const RENEWED_EVERY: Duration = Duration::from_secs(4);

/// Long enough for any test.
const LONG: Duration = Duration::from_secs(3600);

/// A broker that accepts this issuer's tokens, and its own users. The tests share it, and don't change it.
struct Site {
    broker: Broker,
    issuer: Issuer,
}

fn site() -> &'static Site {
    static SITE: OnceLock<Site> = OnceLock::new();
    SITE.get_or_init(|| {
        let issuer = Issuer::new();
        let broker = issuer.trusted_by(Broker::options()).start();
        Site { broker: broker.unwrap_or_else(|error| panic!("{error:#}")), issuer }
    })
}

impl Site {
    /// Whether the broker ends connections whose tokens have expired.
    fn ends_connections(&self) -> bool {
        self.broker.version() >= (4, 3, 0)
    }

    fn queue(&self, name: &str) -> Queue {
        self.broker.declare(name).quorum().create()
    }

    /// Checks that all connections for this queue were closed with a goodbye.
    #[track_caller]
    fn assert_goodbyes(&self, queue: &Queue) {
        let log = self.broker.log();
        let lines: Vec<_> = log.lines().collect();
        for pair in lines.windows(2) {
            let rude = pair[1].contains("unexpectedly closed") && pair[0].contains(queue.name());
            assert!(!rude, "{}\n{}", pair[0], pair[1]);
        }
    }
}

/// A file as Kubernetes mounts a Secret or a projected token: a symbolic link through a second one, which an update
/// replaces.
struct Mount {
    folder: PathBuf,
    /// All contents so far.
    secrets: Mutex<Vec<String>>,
}

impl Mount {
    fn new(text: impl Into<String>) -> Arc<Self> {
        let mount = Self { folder: temp_folder("mount"), secrets: Mutex::default() };
        mount.put(text);
        symlink("..data/token", mount.path()).unwrap();
        Arc::new(mount)
    }

    fn path(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// Replaces the content, atomically.
    fn put(&self, text: impl Into<String>) {
        let text = text.into();
        let version = format!("..{:016x}", fastrand::u64(..));
        fs::create_dir(self.folder.join(&version)).unwrap();
        fs::write(self.folder.join(&version).join("token"), &text).unwrap();
        let link = self.folder.join("..data_tmp");
        symlink(&version, &link).unwrap();
        fs::rename(&link, self.folder.join("..data")).unwrap();
        self.secrets.lock().unwrap().push(text);
    }

    /// Makes the file disappear.
    fn remove(&self) {
        fs::remove_file(self.folder.join("..data")).unwrap();
    }

    /// Renews the token at regular intervals, until the returned sender is dropped.
    fn renewed(self: &Arc<Self>) -> mpsc::Sender<()> {
        let (sender, stopped) = mpsc::channel();
        let mount = Arc::clone(self);
        thread::spawn(move || {
            while stopped.recv_timeout(RENEWED_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                mount.put(site().issuer.token(LIFE));
            }
        });
        sender
    }

    /// A worker that logs in with the token in the file.
    fn worker(&self, proxy: &Proxy, queue: &Queue) -> Program {
        self.program(qconsume(), "any", proxy, queue)
    }

    /// The same for a program and a user.
    fn program(&self, program: Program, user: &str, proxy: &Proxy, queue: &Queue) -> Program {
        let url = format!("amqp://{user}@{}", proxy.addr());
        let program = program.url(&url).queue(queue.name()).env("QCONSUME_PASSWORD_FILE", self.path());
        program.env("QCONSUME_LOG", "debug")
    }

    /// Waits for the end, and checks that no message shows a part of any content so far, such as a token's claims or
    /// signature.
    #[track_caller]
    fn finish(&self, running: &Running) -> Finished {
        let done = running.finish(PATIENCE);
        for secret in self.secrets.lock().unwrap().iter() {
            // A token's parts are long; a URL's other parts are short.
            for part in secret.split(['.', '@']).filter(|part| part.len() > 30 && !part.starts_with("amqp:")) {
                assert!(!done.stderr.contains(part), "a token is shown:\n{}", done.stderr);
            }
        }
        done
    }
}

/// A command that takes three times as long as a token is valid.
fn long_command() -> String {
    format!("sleep {}; cat", 3 * LIFE.as_secs())
}

/// A command that takes a little longer than a token is valid.
fn slow(then: &str) -> String {
    format!("sleep {}; {then}", LIFE.as_secs() + 2)
}

/// A URL with this token, which is never renewed.
fn url_with(token: &str, proxy: &Proxy) -> String {
    format!("amqp://any:{token}@{}", proxy.addr())
}

fn updates(proxy: &Proxy) -> usize {
    proxy.count(ToBroker, Method::CONNECTION_UPDATE_SECRET)
}

#[test]
fn a_command_may_take_three_times_as_long_as_a_token_that_is_renewed() {
    let site = site();
    let queue = site.queue("long-task");
    queue.publish(MESSAGE);
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let _renewed = mount.renewed();
    let done = mount.finish(&mount.worker(&proxy, &queue).shell(&long_command()).spawn());
    done.assert_status(0).assert_stderr("the broker has the new token");
    assert_eq!(done.stdout_text(), MESSAGE);
    assert_eq!((proxy.accepted(), proxy.count(ToClient, Method::BASIC_DELIVER)), (1, 1));
    assert!(updates(&proxy) >= 5, "{} renewals", updates(&proxy));
    assert_gone(&queue);
    site.assert_goodbyes(&queue);
}

#[test]
fn a_token_in_the_url_file_is_renewed_too() {
    let site = site();
    let queue = site.queue("url-file");
    queue.publish(MESSAGE);
    let proxy = Proxy::of(&site.broker);
    let url = || url_with(&site.issuer.token(LIFE), &proxy);
    let mount = Mount::new(url());
    let flag = temp_folder("url-file").join("flag");
    let worker = qconsume().env("BROKER_URL_FILE", mount.path()).queue(queue.name()).args(["--log-level", "debug"]);
    let running = worker.shell(&until_there(&flag)).spawn();
    running.wait_for_stdout("started", PATIENCE);
    for renewal in 1..=4 {
        mount.put(url());
        proxy.wait_for_nth(ToClient, Method::CONNECTION_UPDATE_SECRET_OK, renewal);
    }
    fs::write(flag, "").unwrap();
    mount.finish(&running).assert_status(0);
    assert_eq!(proxy.accepted(), 1);
    assert_gone(&queue);
}

#[test]
fn without_a_new_token_a_run_ends_only_if_the_broker_ends_the_connection() {
    let site = site();
    for from_file in [true, false] {
        let queue = site.queue("expires");
        queue.publish(MESSAGE);
        let proxy = Proxy::of(&site.broker);
        let token = site.issuer.token(LIFE);
        let mount = Mount::new(&token);
        let mut worker = mount.worker(&proxy, &queue);
        let mut advice = format!("check what renews {}", mount.path().display());
        if !from_file {
            worker = worker.env_remove("QCONSUME_PASSWORD_FILE").url(&url_with(&token, &proxy));
            advice = "mount one that is renewed (--password-file)".to_owned();
        }
        let done = mount.finish(&worker.shell(&slow("cat")).spawn());
        if site.ends_connections() {
            let why = format!("the token has expired: CONNECTION_FORCED - credential expired; {advice}");
            done.assert_status(75).assert_stderr(&why);
            assert_back(&queue);
        } else {
            done.assert_status(0);
            assert_gone(&queue);
        }
        assert_eq!((proxy.accepted(), updates(&proxy)), (1, 0));
        site.assert_goodbyes(&queue);
    }
}

/// Fails at each message's first attempt, after the token has expired.
fn fails_once(before: &str) -> String {
    format!("[ \"$MESSAGE_ATTEMPT\" -gt 1 ] || {{ {} exit 3; }}", slow(before))
}

const KEEP_GOING: [&str; 4] = ["--drain", "--keep-going", "--max-attempts", "2"];

#[test]
fn a_run_goes_on_after_its_first_token_has_expired() {
    let site = site();
    let queue = site.queue("keep-going");
    queue.publish_all(["one", "two"]);
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let _renewed = mount.renewed();
    let run = mount.worker(&proxy, &queue).args(KEEP_GOING).shell(&fails_once("")).spawn();
    mount.finish(&run).assert_status(0).assert_stderr("2 acknowledged, 2 requeued");
    assert_eq!(proxy.accepted(), 1);
    site.assert_goodbyes(&queue);
}

#[test]
fn a_token_that_is_renewed_too_late_costs_a_connection() {
    let site = site();
    if site.ends_connections() {
        return version_lacks("connections that outlive their tokens");
    }
    let queue = site.queue("too-late");
    queue.publish("one");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let next = Mount::new(site.issuer.token(LONG));
    // The command renews the token right before it ends. qconsume then subscribes again before it reads the file again.
    let renew = format!("cat '{}' >'{}';", next.path().display(), mount.path().display());
    let run = mount.worker(&proxy, &queue).args(KEEP_GOING).shell(&fails_once(&renew)).spawn();
    let done = mount.finish(&run);
    done.assert_status(0).assert_stderr("the token has expired: ACCESS_REFUSED - ").assert_stderr("trying again");
    assert_eq!((proxy.accepted(), updates(&proxy)), (2, 0));
    site.assert_goodbyes(&queue);
}

#[test]
fn an_expired_token_that_nothing_renews_ends_the_run_with_77() {
    let site = site();
    let queue = site.queue("expired");
    let proxy = Proxy::of(&site.broker);
    let expired = url_with(&site.issuer.token_until(SystemTime::now() - Duration::from_secs(75)), &proxy);
    for program in [qconsume().arg("cat"), qpublish().arg("orange")] {
        let done = program.url(&expired).queue(queue.name()).run();
        done.assert_status(77).assert_stderr("; the token expired 1m ").assert_stderr(" ago; ");
        done.assert_stderr("mount one that is renewed (--password-file)");
    }
    assert_eq!(proxy.accepted(), 2);

    // With the long name, the broker cuts off the end of its text, which is the reason.
    for (name, seen) in [("short", "Provided JWT token has expired"), (&"long-".repeat(30), "...")] {
        let queue = site.queue(name);
        queue.publish("one");
        let url = url_with(&site.issuer.token(LIFE), &proxy);
        let run = qconsume().url(&url).queue(queue.name()).args(KEEP_GOING).shell(&fails_once("")).run();
        if site.ends_connections() {
            run.assert_status(75).assert_stderr("the token has expired: CONNECTION_FORCED - credential expired; mount");
        } else {
            run.assert_status(77).assert_stderr("the token has expired: ACCESS_REFUSED - ").assert_stderr(seen);
        }
        run.assert_stderr("mount one that is renewed (--password-file)");
        site.assert_goodbyes(&queue);
    }
}

/// The scopes that docs/oauth2.md names.
#[test]
fn a_token_needs_the_documented_scopes_and_no_more() {
    let site = site();
    let queue = site.queue("scopes");
    let name = queue.name();
    let run = |program: Program, scopes: &str| {
        let claims = format!(r#"{{"sub":"worker","aud":["rabbitmq"],"exp":9999999999,"scope":"{scopes}"}}"#);
        program.url(&site.broker.url_for("any", &site.issuer.sign(&claims), "/")).queue(name).run()
    };
    let (write, read) = ("rabbitmq.write:%2F/amq.default", format!("rabbitmq.read:%2F/{name}"));
    let declare = format!("{write} rabbitmq.configure:%2F/{name}");
    run(qpublish().args(["--declare=quorum", "one"]), &declare).assert_status(0);
    run(qpublish().arg("two"), write).assert_status(0);
    run(qconsume().args(["--drain", "cat"]), &read).assert_status(0).assert_stderr("is empty");
    for (program, scopes, says) in [
        (qconsume().arg("cat"), "", "may not use virtual host \"/\""),
        (qconsume().arg("cat"), write, "may not consume from queue"),
        (qpublish().arg("three"), &read, "may not publish here"),
        (qpublish().args(["--declare=quorum", "three"]), write, "may not declare queue"),
    ] {
        let done = run(program, scopes);
        done.assert_status(77).assert_stderr(says).assert_stderr("; the token needs a scope for it");
    }
}

#[test]
fn a_worker_waits_across_renewals_on_one_connection() {
    let site = site();
    let queue = site.queue("waits");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let _renewed = mount.renewed();
    let running = mount.worker(&proxy, &queue).arg("cat").spawn();
    // The fourth renewal comes after the first token has expired.
    proxy.wait_for_nth(ToClient, Method::CONNECTION_UPDATE_SECRET_OK, 4);
    queue.publish(MESSAGE);
    let done = mount.finish(&running);
    done.assert_status(0);
    assert_eq!((done.stdout_text(), proxy.accepted()), (MESSAGE.to_owned(), 1));
    site.assert_goodbyes(&queue);
}

#[test]
fn a_worker_that_waits_with_an_expired_token_connects_with_the_next_one() {
    let site = site();
    let queue = site.queue("waits-on");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let running = mount.worker(&proxy, &queue).arg("cat").spawn();
    if site.ends_connections() {
        running.wait_for_stderr("while waiting for a message: the token has expired", PATIENCE);
        running.wait_for_stderr("; the token expired ", PATIENCE);
        mount.put(site.issuer.token(LONG));
        proxy.wait_accepted(2);
    } else {
        thread::sleep(LIFE);
    }
    queue.publish(MESSAGE);
    mount.finish(&running).assert_status(0);
    site.assert_goodbyes(&queue);
}

/// Starts qpublish; returns it, and the writing end of its standard input.
fn publishing(program: Program) -> (Running, File) {
    let fifo = temp_folder("fifo").join("lines");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let script = format!("exec \"$0\" \"$@\" <'{}'", fifo.display());
    let running = program.arg("--lines").through(["sh", "-c", &script]).spawn();
    let input = File::options().write(true).open(fifo).unwrap();
    (running, input)
}

#[test]
fn qpublish_renews_its_token_too() {
    let site = site();
    let queue = site.queue("published");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LIFE));
    let _renewed = mount.renewed();
    let (running, mut input) = publishing(mount.program(qpublish(), "any", &proxy, &queue));
    writeln!(input, "one").unwrap();
    proxy.wait_for_nth(ToClient, Method::CONNECTION_UPDATE_SECRET_OK, 4);
    writeln!(input, "two").unwrap();
    drop(input);
    mount.finish(&running).assert_status(0).assert_stderr("2 messages confirmed");
    assert_eq!(proxy.accepted(), 1);
    queue.wait_ready(2);
    site.assert_goodbyes(&queue);
}

#[test]
fn qpublish_says_that_its_token_has_expired() {
    let site = site();
    for from_file in [true, false] {
        let queue = site.queue("published-too-late");
        let proxy = Proxy::of(&site.broker);
        let token = site.issuer.token(LIFE);
        let mount = Mount::new(&token);
        let mut program = mount.program(qpublish(), "any", &proxy, &queue);
        if !from_file {
            program = program.env_remove("QCONSUME_PASSWORD_FILE").url(&url_with(&token, &proxy));
        }
        let (running, mut input) = publishing(program);
        writeln!(input, "one").unwrap();
        proxy.wait_for(ToClient, Method::BASIC_ACK);
        thread::sleep(LIFE + Duration::from_secs(1));
        // qpublish may have ended by now.
        let _ = writeln!(input, "two");
        let done = mount.finish(&running);
        let (status, advice) = match from_file {
            true => (75, "check what renews "),
            false => (77, "mount one that is renewed (--password-file)"),
        };
        done.assert_status(status).assert_stderr("the token has expired: ").assert_stderr(advice);
        done.assert_stderr("1 from the start without a gap");
        queue.wait_ready(1);
        site.assert_goodbyes(&queue);
    }
}

#[test]
fn a_wrong_token_after_a_right_one_costs_the_connection() {
    let site = site();
    let queue = site.queue("wrong");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LONG));
    let wrong = Issuer::new().token(LONG);
    let refused = "the broker refused the new token: NOT_ALLOWED - New secret was refused";

    queue.publish(MESSAGE);
    let running = mount.worker(&proxy, &queue).shell("echo started; sleep 600").spawn();
    running.wait_for_stdout("started", PATIENCE);
    mount.put(&wrong);
    let done = mount.finish(&running);
    done.assert_status(75).assert_stderr(refused);
    assert_back(&queue);

    // While waiting for a message, qconsume goes on with the file's next content.
    mount.put(site.issuer.token(LONG));
    let running = mount.worker(&proxy, &queue).arg("cat").spawn();
    running.wait_for_stderr("waiting for a message", PATIENCE);
    mount.put(&wrong);
    running.wait_for_stderr(refused, PATIENCE);
    running.wait_for_stderr("; check the token", PATIENCE);
    mount.put(site.issuer.token(LONG));
    queue.publish(MESSAGE);
    mount.finish(&running).assert_status(0).assert_stderr("again before each new connection");
    site.assert_goodbyes(&queue);
}

#[test]
fn a_file_that_is_gone_or_empty_for_a_moment_changes_nothing() {
    let site = site();
    let queue = site.queue("gone");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LONG));
    let running = mount.worker(&proxy, &queue).arg("cat").spawn();
    proxy.wait_for(ToClient, Method::BASIC_CONSUME_OK);
    mount.remove();
    proxy.cut();
    running.wait_for_stderr("can't be read: No such file", PATIENCE);
    proxy.wait_for_nth(ToClient, Method::BASIC_CONSUME_OK, 2);
    mount.put("\n");
    running.wait_for_stderr("is empty", PATIENCE);
    proxy.cut();
    running.wait_for_stderr("is empty; using its previous content", PATIENCE);
    proxy.wait_for_nth(ToClient, Method::BASIC_CONSUME_OK, 3);
    mount.put(site.issuer.token(LONG));
    proxy.wait_for(ToClient, Method::CONNECTION_UPDATE_SECRET_OK);
    queue.publish(MESSAGE);
    mount.finish(&running).assert_status(0);
    assert_eq!((proxy.accepted(), updates(&proxy)), (3, 1));
}

#[test]
fn a_token_that_is_half_written_is_not_sent() {
    let site = site();
    let queue = site.queue("half");
    let proxy = Proxy::of(&site.broker);
    let mount = Mount::new(site.issuer.token(LONG));
    let running = mount.worker(&proxy, &queue).arg("cat").spawn();
    running.wait_for_stderr("waiting for a message", PATIENCE);
    // Slowly, so that qconsume checks the file in between.
    let token = site.issuer.token(LONG);
    let mut file = File::create(mount.path()).unwrap();
    for byte in token.bytes() {
        file.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(10));
    }
    proxy.wait_for(ToClient, Method::CONNECTION_UPDATE_SECRET_OK);
    queue.publish(MESSAGE);
    mount.finish(&running).assert_status(0);
    assert_eq!((proxy.accepted(), updates(&proxy)), (1, 1));
}

#[test]
fn a_renewal_and_a_settlement_do_not_disturb_each_other() {
    let site = site();
    // The renewal's reply comes together with the settlement's, or never.
    for action in [Action::Pass, Action::SwallowFrame] {
        let queue = site.queue("settles");
        queue.publish(MESSAGE);
        let proxy = Proxy::of(&site.broker);
        let mount = Mount::new(site.issuer.token(LONG));
        let flag = temp_folder("settles").join("flag");
        let running = mount.worker(&proxy, &queue).shell(&until_there(&flag)).spawn();
        running.wait_for_stdout("started", PATIENCE);
        proxy.on(ToBroker, Method::CONNECTION_UPDATE_SECRET, action);
        proxy.once(ToClient, Method::BASIC_QOS_OK, Action::Hold);
        fs::write(flag, "").unwrap();
        proxy.wait_for(ToBroker, Method::BASIC_ACK);
        mount.put(site.issuer.token(LONG));
        proxy.wait_for(ToBroker, Method::CONNECTION_UPDATE_SECRET);
        proxy.release();
        mount.finish(&running).assert_status(0).assert_stderr("message acknowledged");
        assert_eq!(proxy.sent().last(), Some(&Method::CONNECTION_CLOSE));
        assert_gone(&queue);
        site.assert_goodbyes(&queue);
    }
}

#[test]
fn a_login_that_is_refused_is_tried_again_with_the_files_new_content() {
    let broker = Broker::shared();
    for program in [qconsume().arg("cat"), qpublish().arg("orange")] {
        let queue = broker.queue("rotated");
        queue.publish(MESSAGE);
        let proxy = Proxy::of(broker);
        let mount = Mount::new("wrong\n");
        let running = mount.program(program, "guest", &proxy, &queue).spawn();
        running.wait_for_stderr("check the user and the password; trying again", PATIENCE);
        mount.put("guest\n");
        let done = running.wait(PATIENCE);
        done.assert_status(0);
        assert_eq!(done.stderr.matches("again before each new connection").count(), 1, "{}", done.stderr);
    }
}

#[test]
fn a_login_that_stays_refused_is_77_at_the_connect_timeout() {
    let broker = Broker::shared();
    let queue = broker.queue("refused");
    let proxy = Proxy::of(broker);
    let mount = Mount::new("wr0ng-hunter2");
    let url = temp_folder("refused").join("url");
    fs::write(&url, format!("amqp://guest:wr0ng-hunter2@{}", proxy.addr())).unwrap();
    let by_url = qconsume().queue(queue.name()).env("BROKER_URL_FILE", url);
    let authfile = temp_folder("refused").join("auth");
    fs::write(&authfile, "username:guest\npassword:wr0ng-hunter2\n").unwrap();
    let host = proxy.addr().to_string();
    let by_authfile = qconsume().queue(queue.name()).args(["--server", &host, "--authfile"]).arg(authfile);
    let by_file = mount.program(qconsume(), "guest", &proxy, &queue);
    for program in [by_file, by_url, by_authfile] {
        let before = proxy.accepted();
        let done = program.args(["--connect-timeout", "3s", "cat"]).run();
        done.assert_status(77).assert_stderr("gave up after 3s (--connect-timeout)");
        done.assert_stderr("the broker refused the login of user \"guest\"");
        assert_eq!(done.stderr.matches("again before each new connection").count(), 1, "{}", done.stderr);
        assert!(!done.stderr.contains("hunter2"), "{}", done.stderr);
        let logins = proxy.accepted() - before;
        assert!((2..=12).contains(&logins), "{logins} logins");
    }
}

#[test]
fn an_ordinary_password_is_not_sent_over_an_open_connection() {
    let queue = Broker::shared().queue("ordinary");
    let proxy = Proxy::of(Broker::shared());
    let mount = Mount::new("guest");
    let running = mount.program(qconsume(), "guest", &proxy, &queue).arg("cat").spawn();
    running.wait_for_stderr("waiting for a message", PATIENCE);
    mount.put("an.ordinary.password");
    running.wait_for_stderr("has another password, for the next connection", PATIENCE);
    queue.publish(MESSAGE);
    running.wait(PATIENCE).assert_status(0);
    assert_eq!((proxy.accepted(), updates(&proxy)), (1, 0));
}
