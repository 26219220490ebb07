//! Plays one run against the program: the broker, the signals and the command do what the model says, in its order.
//! Each step waits until the program has written something or its command has printed something, and never just for
//! some time.

use super::run::{Run, Step, What};
use crate::{
    broker::{Delivery, Id, Kind, Reply, Request, TAGS},
    worker::{Ending, KILLED, Phase},
};
use std::{
    fs,
    io::{PipeReader, PipeWriter, Write, pipe},
    os::fd::AsRawFd,
    process::{self, Command},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use testbed::{
    Method, Program, Running, Signal, frames,
    peer::{self, Answer, Peer, Request as Seen},
};

/// How long to wait for the program. Only one that differs from the model takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// `--wait` and `--timeout`, if they pass in this run. If they may have passed too early ([`Run::is_timed`]), a run
/// that differs is played again with the next one.
const LIMITS: [&str; 3] = ["500ms", "2s", "10s"];

/// From 80 % of this time on, a run is long ([`System::long`](crate::system::System::long)).
const ACK_TIMEOUT: &str = "100ms";
const LONG: Duration = Duration::from_millis(85);

/// The text of RabbitMQ's `channel.close` after an acknowledgement timeout.
const TIMED_OUT: &str =
    "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms.";

/// Prints when it starts and gets SIGTERM, and ends as a line from the pipe says; the pipe's path replaces `PIPE`.
const COMMAND: &str = r#"
trap 'echo term' TERM
read -r body
exec 3<PIPE
echo "started $body"
until read -r how <&3; do [ -e PIPE ] || exit 99; done
if [ "$how" = term ]; then trap - TERM; kill -TERM $$; fi
exit "$how"
"#;

/// How the program differs from the model.
pub type Difference = String;

/// Plays a run.
///
/// # Errors
/// How the program differs, and the run.
pub fn play(run: &Run, seed: u64) -> Result<(), Difference> {
    let limits = if run.is_timed() { &LIMITS[..] } else { &LIMITS[..1] };
    let mut result = Ok(());
    for limit in limits {
        result = Player::new(run, limit, seed).play();
        if result.is_ok() {
            break;
        }
    }
    result
}

struct Player<'a> {
    run: &'a Run,
    peer: Peer,
    program: Running,
    /// Tells one command after the other how to end.
    ends: PipeWriter,
    /// Kept open, as commands open it by its path.
    _reader: PipeReader,
    random: fastrand::Rng,
    /// The number of the current connection, from 1; 0 before the first.
    connection: usize,
    /// What the program should have written, for each connection.
    expected: Vec<Vec<Request>>,
    /// What it may have written already, as it does that by itself: after a pause, for example.
    ahead: Vec<Request>,
    log: Arc<Mutex<Log>>,
    /// Bytes to send together with the next ones.
    unsent: Vec<u8>,
    /// The program has certainly read everything that was sent.
    is_read: bool,
    /// Messages delivered on this channel.
    delivered: u64,
    /// In the model, the program has asked whether the queue is empty, and has no answer yet.
    asks: bool,
    /// A signal and a message came at the same time, so the program may cancel its consumer with or without a reply.
    may_cancel: bool,
    /// Commands that were told to end.
    told: usize,
    /// When the last command started.
    started: Instant,
    /// How often commands got SIGTERM.
    terms: usize,
}

impl<'a> Player<'a> {
    fn new(run: &'a Run, limit: &str, seed: u64) -> Self {
        let (reader, ends) = pipe().expect("a pipe");
        let place = format!("/proc/{}/fd/{}", process::id(), reader.as_raw_fd());
        let log: Arc<Mutex<Log>> = Arc::default();
        let peer = Peer::new({
            let log = log.clone();
            move |seen| log.lock().unwrap().take(seen)
        });
        let command = COMMAND.replace("PIPE", &place);
        let program = program(run, limit).url(&peer.url()).queue("q").shell(&command).spawn();
        Self {
            run,
            peer,
            program,
            ends,
            _reader: reader,
            random: fastrand::Rng::with_seed(seed),
            connection: 0,
            expected: Vec::new(),
            ahead: Vec::new(),
            log,
            unsent: Vec::new(),
            is_read: true,
            delivered: 0,
            asks: false,
            may_cancel: false,
            told: 0,
            started: Instant::now(),
            terms: 0,
        }
    }

    fn play(mut self) -> Result<(), Difference> {
        let mut at = 0;
        let steps = &self.run.steps;
        let mut difference = None;
        while at < steps.len() && difference.is_none() {
            let done = self.step(&steps[at], &steps[at + 1..]);
            at += 1;
            match done {
                // A signal was sent together with the step before it.
                Ok(true) => at += 1,
                Ok(false) => {}
                Err(why) => difference = Some(format!("at step {at}: {why}")),
            }
        }
        let ended = self.end();
        let end = match ended {
            Some(status) if status == i32::from(self.run.status) => "the same status".to_owned(),
            Some(status) => format!("status {status} instead of {}", self.run.status),
            None => "the program hung".to_owned(),
        };
        if difference.is_none() && self.run.status != KILLED {
            difference = self.compare(true).err();
        }
        match difference {
            None if end == "the same status" => Ok(()),
            difference => {
                let difference = difference.unwrap_or_default();
                Err(format!("{end}: {difference}\n{}\nits log:\n{}", self.story(), self.program.stderr()))
            }
        }
    }

    /// Makes one step happen, and waits until the program has reacted. Returns whether it included the next step.
    fn step(&mut self, step: &Step, later: &[Step]) -> Result<bool, Difference> {
        let next = later.first();
        let ends = matches!(step.after, Phase::Ended(_));
        let is_taken = matches!(step.after, Phase::Taken(_));
        let with_signal = is_taken && next.is_some_and(|next| next.what == What::Stop);
        self.expect(step, later);
        match step.what {
            What::Connect => self.connect()?,
            What::Receive(reply, before) => {
                self.send(reply, before);
                if is_taken && next.is_some_and(|next| matches!(next.what, What::CommandEnds(Ending::NotStarted(_)))) {
                    self.leave_no_descriptor()?;
                }
                if with_signal {
                    self.meet()?;
                } else if next.is_some_and(|next| matches!(next.what, What::Receive(..))) && step.writes.is_empty() {
                    // It is sent together with the next reply.
                    return Ok(false);
                }
                self.flush(ends);
            }
            What::Notice => self.lose(),
            What::TimeLimit => self.wait_for_term()?,
            What::CommandEnds(ending) if matches!(step.before, Phase::Running(_)) => {
                if self.run.system.long {
                    thread::sleep(LONG.saturating_sub(self.started.elapsed()));
                }
                self.end_command(ending);
            }
            What::Start | What::CommandEnds(_) | What::LookAgain | What::Ask | What::WaitOver => {}
            What::Stop => self.stop(step)?,
            What::Kill => self.program.signal(Signal::SIGKILL),
        }
        if let (Phase::Running(_), What::Receive(..) | What::Notice) = (step.before, step.what)
            && ends
        {
            // The loss stops the command.
            self.wait_for_term()?;
            self.end_command(Ending::Success);
        }
        if !ends {
            self.wait("what the model writes", |player| player.compare(false))?;
            self.is_read |= !step.writes.is_empty();
        }
        if let Phase::Running(run) = step.after
            && !matches!(step.before, Phase::Running(_))
        {
            self.wait_for_start(run.delivery.id)?;
        }
        Ok(with_signal)
    }

    /// Records what the program writes in this step of the model.
    fn expect(&mut self, step: &Step, later: &[Step]) {
        if step.what == What::Connect {
            self.expected.push(Vec::new());
        }
        for request in &step.writes {
            match request {
                Request::Declare => self.asks = true,
                Request::Subscribe => self.delivered = 0,
                _ => {}
            }
            if *request != Request::Declare {
                self.expected.last_mut().expect("there is one").push(*request);
            }
        }
        let may_come = later.iter().take_while(|step| step.is_programs_own() || step.writes.is_empty());
        self.ahead =
            may_come.flat_map(|step| step.writes.iter().copied()).filter(|it| *it != Request::Declare).collect();
    }

    fn connect(&mut self) -> Result<(), Difference> {
        self.connection += 1;
        (self.delivered, self.asks, self.is_read) = (0, self.run.system.drains(), true);
        self.greet()?;
        self.wait("basic.consume", |player| Ok(player.with_log(|connection| connection.channel.is_some())))
    }

    /// Accesses the log of the current connection.
    fn with_log<T>(&self, look: impl FnOnce(&mut Connection) -> T) -> T {
        look(self.log.lock().unwrap().connection(self.connection))
    }

    fn connections(&self) -> usize {
        self.log.lock().unwrap().0.iter().filter(|connection| connection.is_made).count()
    }

    /// Waits for the current connection, and answers its protocol header.
    fn greet(&mut self) -> Result<(), Difference> {
        let connection = self.connection;
        self.wait("a connection", |player| Ok(player.connections() >= connection))?;
        let version = if self.run.system.kind == Kind::Quorum43 { "4.3.6" } else { "4.0.5" };
        self.peer.send(connection, &peer::greeting(version));
        Ok(())
    }

    fn send(&mut self, reply: Reply, before: u8) {
        let channel = self.channel();
        let bytes = match reply {
            Reply::Deliver(delivery) => self.message(delivery, before),
            Reply::QosOk => self.answer(Method::BASIC_QOS, 0),
            Reply::CancelOk => self.answer(Method::BASIC_CANCEL, 0),
            Reply::DeclareOk { empty } => {
                self.asks = false;
                self.answer(Method::QUEUE_DECLARE, u32::from(!empty))
            }
            Reply::ConsumerCancelled => frames::basic_cancel(channel, "qconsume"),
            Reply::ChannelClosed => {
                self.drop_open();
                frames::channel_close(channel, 406, TIMED_OUT)
            }
        };
        self.unsent.extend(bytes);
    }

    /// Earlier requests get no answer any more.
    fn drop_open(&mut self) {
        self.asks = false;
        self.with_log(|connection| connection.open.clear());
    }

    /// A delivery whose body is the message's id.
    fn message(&mut self, delivery: Delivery, before: u8) -> Vec<u8> {
        self.delivered += 1;
        let failures = delivery.failures.unwrap_or_default();
        let delivered = ("x-delivery-count", failures.into());
        let acquired = ("x-acquired-count", before.into());
        let counts = match self.run.system.kind {
            _ if before == 0 => vec![],
            Kind::Classic => vec![],
            Kind::Quorum => vec![delivered],
            Kind::Quorum43 if failures == 0 => vec![acquired],
            Kind::Quorum43 => vec![acquired, delivered],
        };
        let body = format!("{}\n", delivery.id);
        peer::counted_message(self.channel(), self.delivered, before > 0, &counts, body.as_bytes())
    }

    /// The answer to the first open request of this method, or nothing; `ready` is the number of ready messages.
    fn answer(&self, method: Method, ready: u32) -> Vec<u8> {
        self.with_log(|connection| {
            let at = connection.open.iter().position(|seen| seen.method == method);
            at.map_or(Vec::new(), |at| usual(&connection.open.remove(at), ready))
        })
    }

    /// The channel of the last consumer.
    fn channel(&self) -> u16 {
        self.with_log(|connection| connection.channel.unwrap_or_default())
    }

    /// Sends the unsent bytes. At the run's end, `with_answers`, also the answers to all open requests: if the program
    /// goes on after the model's end, these let it succeed, which shows.
    fn flush(&mut self, with_answers: bool) {
        if with_answers {
            self.answer_all();
        }
        let unsent = std::mem::take(&mut self.unsent);
        if !unsent.is_empty() {
            self.peer.send(self.connection, &unsent);
            self.is_read = false;
        }
    }

    fn answer_all(&mut self) {
        let open = self.with_log(|connection| std::mem::take(&mut connection.open));
        self.unsent.extend(open.iter().flat_map(|seen| usual(seen, 0)));
    }

    /// Ends the connection in a random way. A reset may destroy data that the program hasn't read.
    fn lose(&mut self) {
        self.flush(false);
        self.drop_open();
        match self.random.u8(..3) {
            0 if self.is_read => self.peer.reset(self.connection),
            1 => self.peer.send(self.connection, &frames::connection_close(320, "CONNECTION_FORCED - shutdown")),
            _ => self.peer.close(self.connection),
        }
    }

    /// Sends a message and SIGTERM at the same time: the program is stopped until both have arrived.
    fn meet(&mut self) -> Result<(), Difference> {
        self.program.signal(Signal::SIGSTOP);
        let threads = format!("/proc/{}/task", self.program.pid());
        let has_stopped = |thread: fs::DirEntry| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|fields| fields.starts_with('T'))
        };
        self.wait("SIGSTOP's effect", |_| {
            Ok(fs::read_dir(&threads).is_ok_and(|threads| threads.flatten().all(has_stopped)))
        })?;
        self.may_cancel = true;
        self.flush(false);
        self.program.signal(Signal::SIGTERM);
        self.program.signal(Signal::SIGCONT);
        Ok(())
    }

    /// Makes starting a command fail with EMFILE.
    fn leave_no_descriptor(&self) -> Result<(), Difference> {
        let folder = format!("/proc/{}/fd", self.program.pid());
        let free = (0..).find(|fd| fs::symlink_metadata(format!("{folder}/{fd}")).is_err()).unwrap_or(0);
        let pid = self.program.pid().to_string();
        let limited = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={free}:")]).status();
        limited.is_ok_and(|status| status.success()).then_some(()).ok_or("prlimit(1) failed".to_owned())
    }

    fn stop(&mut self, step: &Step) -> Result<(), Difference> {
        if step.before == Phase::Connecting {
            // Once it connects, it handles signals.
            let connection = self.connection + 1;
            self.wait("a connection", |player| Ok(player.connections() >= connection))?;
        }
        self.program.signal(Signal::SIGTERM);
        if matches!(step.before, Phase::Running(_)) {
            self.wait_for_term()?;
        }
        Ok(())
    }

    fn wait_for_start(&mut self, id: Id) -> Result<(), Difference> {
        let (told, line) = (self.told, format!("started {id}"));
        self.wait("the command's start", |player| {
            let out = player.out();
            let started = out.lines().filter(|line| line.starts_with("started")).nth(told);
            match started {
                Some(started) if started != line => Err(format!("the command says {started:?} instead of {line:?}")),
                started => Ok(started.is_some()),
            }
        })?;
        (self.started, self.is_read) = (Instant::now(), true);
        Ok(())
    }

    fn wait_for_term(&mut self) -> Result<(), Difference> {
        let terms = self.terms;
        self.wait("SIGTERM to the command", |player| Ok(player.count("term") > terms))?;
        self.terms += 1;
        Ok(())
    }

    fn end_command(&mut self, ending: Ending) {
        let how = match ending {
            Ending::Failure(status) => status.to_string(),
            Ending::Stopped => "term".to_owned(),
            Ending::Success | Ending::NotStarted(_) => "0".to_owned(),
        };
        writeln!(self.ends, "{how}").expect("the pipe has room");
        self.told += 1;
    }

    fn out(&self) -> String {
        String::from_utf8_lossy(&self.program.stdout()).into_owned()
    }

    fn count(&self, word: &str) -> usize {
        self.out().lines().filter(|line| line.starts_with(word)).count()
    }

    /// Waits until the condition holds. Meanwhile answers requests that the model doesn't have, so that nothing
    /// changes.
    fn wait(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Self) -> Result<bool, Difference>,
    ) -> Result<(), Difference> {
        let end = Instant::now() + PATIENCE;
        loop {
            self.answer_more();
            if condition(self)? {
                return Ok(());
            }
            if self.program.has_ended() && !condition(self)? {
                return Err(format!("the program has ended before {what}"));
            }
            if Instant::now() >= end {
                return Err(format!("{what} didn't come"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn answer_more(&self) {
        if self.connection == 0 {
            return;
        }
        let changes_nothing = |seen: &mut Seen| match seen.method {
            Method::QUEUE_DECLARE => !self.asks,
            Method::BASIC_CANCEL => self.may_cancel,
            _ => false,
        };
        let open: Vec<_> = self.with_log(|connection| connection.open.extract_if(.., changes_nothing).collect());
        for seen in open {
            self.peer.send(self.connection, &usual(&seen, 1));
        }
    }

    /// Whether the program has written everything that it writes in the model; an error if it has written something
    /// else.
    fn compare(&self, at_end: bool) -> Result<bool, Difference> {
        for (expected, n) in self.expected.iter().zip(1..) {
            // The order of two releases doesn't matter.
            let several = expected.iter().filter(|request| matches!(request, Request::Nack(_))).count() > 1;
            let comparable = |request: &Request| match request {
                Request::Cancel { .. } if self.may_cancel => None,
                Request::Nack(_) if several => Some(Request::Nack(0)),
                request => Some(*request),
            };
            let written: Vec<_> =
                self.log.lock().unwrap().connection(n).written.iter().filter_map(comparable).collect();
            let due = expected.iter().filter_map(comparable).count();
            let ahead = self.ahead.iter().filter(|_| n == self.expected.len());
            let expected: Vec<_> = expected.iter().chain(ahead).filter_map(comparable).collect();
            if !expected.starts_with(&written) || at_end && written.len() < due {
                return Err(format!("on connection {n} the program wrote {written:?} instead of {expected:?}"));
            }
            if written.len() < due {
                return Ok(false);
            }
        }
        let is_asked =
            |connection: &mut Connection| connection.open.iter().any(|seen| seen.method == Method::QUEUE_DECLARE);
        Ok(at_end || !self.asks || self.with_log(is_asked))
    }

    /// After the run's end in the model: gives the program whatever it still waits for, until it ends, too. Returns its
    /// exit status, or `None` if it hangs.
    fn end(&mut self) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        self.asks = false;
        while !self.program.has_ended() {
            if Instant::now() >= end {
                return None;
            }
            if self.connections() > self.connection {
                self.connection += 1;
                let _ = self.greet();
            }
            if self.connection > 0 {
                self.flush(true);
            }
            if self.count("started") > self.told {
                self.end_command(Ending::Success);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Some(self.program.finish(PATIENCE).status())
    }

    fn story(&self) -> String {
        let steps = self.run.steps.iter().zip(1..);
        let steps: String = steps.map(|(step, n)| format!("{n:3}. {:?} → {:?}\n", step.what, step.writes)).collect();
        format!("{:?}\n{steps}     status {}", self.run.system, self.run.status)
    }
}

/// A broker's usual answer; `ready` is the number of ready messages.
fn usual(seen: &Seen, ready: u32) -> Vec<u8> {
    match seen.method {
        Method::QUEUE_DECLARE => peer::declared(seen, ready, 1),
        _ => peer::usual(seen),
    }
}

/// The program with the system's options, and with `--timeout` or `--wait` if they pass in this run.
fn program(run: &Run, limit: &str) -> Program {
    let system = &run.system;
    let named = std::env::var_os("QCONSUME_BIN");
    let mut program = Program::new(named.unwrap_or_else(|| env!("CARGO_BIN_EXE_qconsume").into()));
    let meets = |what| run.steps.iter().any(|step| step.what == what);
    program = program.args(["--log-level", "debug"]);
    program = match system.count {
        None => program.arg("--drain"),
        Some(count) => program.arg(format!("--count={count}")),
    };
    let policy = &system.policy;
    let switches = [
        (system.keep_going, "--keep-going"),
        (system.no_ack, "--no-ack"),
        (policy.reject_on.is_some(), "--reject-on=65"),
    ];
    program = program.args(switches.into_iter().filter(|(given, _)| *given).map(|(_, switch)| switch));
    let numbers = [
        ("--max-attempts", policy.max_attempts),
        ("--reject-exit-code", policy.reject_exit_code.map(u64::from)),
        ("--failure-exit-code", policy.failure_exit_code.map(u64::from)),
    ];
    for (option, number) in numbers {
        if let Some(number) = number {
            program = program.arg(format!("{option}={number}"));
        }
    }
    if system.long {
        program = program.args(["--ack-timeout", ACK_TIMEOUT]);
    }
    if meets(What::TimeLimit) {
        program = program.args(["--timeout", limit]);
    }
    if meets(What::WaitOver) {
        program = program.args(["--wait", limit]);
    }
    program
}

/// What the program has written, for each connection, without methods that open and close connections and channels.
#[derive(Default)]
struct Log(Vec<Connection>);

#[derive(Default)]
struct Connection {
    /// The program has sent its protocol header.
    is_made: bool,
    written: Vec<Request>,
    /// Requests without an answer so far, which only steps of the model answer.
    open: Vec<Seen>,
    /// The last consumer's channel.
    channel: Option<u16>,
    /// A channel was opened, and its prefetch isn't set yet.
    is_new: bool,
}

impl Log {
    /// A connection by its number, from 1.
    fn connection(&mut self, n: usize) -> &mut Connection {
        self.0.resize_with(n.max(self.0.len()), Connection::default);
        &mut self.0[n - 1]
    }

    /// Records a request. Returns a broker's usual answer, or nothing if the player decides when to answer.
    fn take(&mut self, seen: &Seen) -> Answer {
        let connection = self.connection(seen.connection);
        let tag = || {
            let tag = seen.arguments.first_chunk().copied().map_or(0, u64::from_be_bytes);
            (tag % u64::from(TAGS)) as u8
        };
        let flags = seen.arguments.last().copied().unwrap_or_default();
        let request = match seen.method {
            Method::PROTOCOL_HEADER => {
                connection.is_made = true;
                return Answer::Bytes(Vec::new());
            }
            Method::CHANNEL_OPEN => {
                connection.is_new = true;
                return Answer::Usual;
            }
            // The first one on a channel sets the prefetch; the others are barriers.
            Method::BASIC_QOS if std::mem::take(&mut connection.is_new) => return Answer::Usual,
            Method::BASIC_CONSUME => {
                if connection.channel.replace(seen.channel).is_none() {
                    return Answer::Usual;
                }
                Request::Subscribe
            }
            Method::BASIC_QOS => Request::Qos,
            Method::BASIC_CANCEL => Request::Cancel { nowait: flags == 1 },
            Method::BASIC_ACK => Request::Ack(tag()),
            Method::BASIC_REJECT => Request::Reject { tag: tag(), requeue: flags == 1 },
            Method::BASIC_NACK => Request::Nack(tag()),
            Method::QUEUE_DECLARE => Request::Declare,
            Method::CONNECTION_CLOSE => Request::Close,
            _ => return Answer::Usual,
        };
        // How often the program asks depends on timing.
        if request != Request::Declare {
            connection.written.push(request);
        }
        let is_withheld = matches!(request, Request::Qos | Request::Cancel { nowait: false } | Request::Declare);
        if !is_withheld {
            return Answer::Usual;
        }
        connection.open.push(seen.clone());
        Answer::Bytes(Vec::new())
    }
}
