//! Runs the recipes for systemd, Compose, plain Docker, HTTP and a retry queue as they are in the documentation, except
//! for the names of programs, images, queues and the broker.

use super::{HTTP_SERVER, LIMIT, QUEUE, http_server, is_installed, programs, root, sandbox};
use std::{fs, path::PathBuf, time::Duration};
use testbed::{
    Broker, PATIENCE, Program, Queue, Signal, docker, docker_works, image_present, missing, owner::docker_label,
};

/// An image with a C library for the programs that the tests build.
const BASE: &str = "debian:bookworm-slim";

/// For eight containers to start and end, on a busy machine.
const COMPOSE_LIMIT: Duration = Duration::from_secs(900);

/// The block with this fence in recipes.md that contains this text.
fn recipe(fence: &str, text: &str) -> String {
    block_of("docs/recipes.md", fence, text)
}

fn block_of(page: &str, fence: &str, text: &str) -> String {
    let page = fs::read_to_string(root().join(page)).expect("there is a page");
    page.split(&format!("```{fence}\n"))
        .skip(1)
        .filter_map(|rest| Some(rest.split_once("```")?.0))
        .find(|block| block.contains(text))
        .unwrap_or_else(|| panic!("there is no recipe with {text}"))
        .to_owned()
}

/// The value of a setting in a unit file.
fn setting<'a>(unit: &'a str, name: &str) -> &'a str {
    unit.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("the unit doesn't set {name}"))
}

/// The command that the unit starts, with this shell script as the worker.
fn service(unit: &str, worker: &str, queue: &Queue) -> Program {
    let mut words = setting(unit, "ExecStart").split(' ');
    let program = words.next().unwrap_or_default();
    let mut words: Vec<_> = words.collect();
    assert_eq!(words.pop(), Some("/usr/bin/worker"));
    Program::new(programs().join(program.trim_start_matches("/usr/bin/")))
        .args(words)
        .args(["sh", "-c", worker])
        .url(&Broker::shared().url())
        .queue(queue.name())
}

/// Whether a setting that is a list contains this status.
fn lists(unit: &str, name: &str, status: i32) -> bool {
    setting(unit, name).split(' ').any(|word| word == status.to_string())
}

#[test]
fn the_systemd_unit_consumes_until_it_is_stopped() {
    let unit = recipe("ini", "[Service]");
    let queue = Broker::shared().queue("docs-systemd");
    queue.publish_all(["apple", "banana"]);
    let running = service(&unit, "cat", &queue).spawn();
    running.wait_for_stdout("applebanana", PATIENCE);
    queue.wait_ready(0);
    running.signal(Signal::SIGTERM);
    let status = running.wait(PATIENCE).status();
    assert!(lists(&unit, "SuccessExitStatus", status), "{status}");
}

/// A worker's 77 must not end the service, unlike qconsume's 77. A worker that systemd stops is no failure.
#[test]
fn the_systemd_unit_starts_again_whatever_the_worker_exits_with() {
    let unit = recipe("ini", "[Service]");
    assert_eq!(setting(&unit, "Restart"), "always");
    let queue = Broker::shared().queue("docs-systemd");
    queue.publish("apple");
    let status = service(&unit, "exit 77", &queue).run().status();
    assert!(!lists(&unit, "RestartPreventExitStatus", status), "{status}");
    let running = service(&unit, "echo started; exec sleep 600", &queue).spawn();
    running.wait_for_stdout("started", PATIENCE);
    running.signal(Signal::SIGTERM);
    let status = running.wait(PATIENCE).status();
    assert!(lists(&unit, "SuccessExitStatus", status), "{status}");
    queue.wait_ready(1);
}

#[test]
fn the_systemd_unit_is_not_restarted_if_a_retry_does_not_help() {
    let permanent: Vec<_> = qconsume::exit::table(qconsume::Program::Qconsume)
        .into_iter()
        .filter(|(_, _, retry)| *retry == "no")
        .map(|(status, _, _)| status)
        .collect();
    // 70 too: each delivery of a message that can't be read counts towards the queue's delivery-limit.
    let permanent = permanent.join(" ").replace("64 ", "64 70 ");
    let unit = recipe("ini", "[Service]");
    assert_eq!(setting(&unit, "RestartPreventExitStatus"), permanent);
}

/// Runs a recipe's commands; the status is that of the last one.
fn run(commands: &str, queue: &Queue) -> testbed::Finished {
    let path = std::env::var("PATH").unwrap_or_default();
    Program::new("/bin/sh")
        .args(["-euc", commands])
        .url(&Broker::shared().url())
        .queue(queue.name())
        .env("PATH", format!("{}:{path}", programs().display()))
        .current_dir(sandbox())
        .spawn()
        .wait(LIMIT)
}

#[test]
fn the_http_recipe_dead_letters_what_the_server_refuses_and_requeues_the_rest() {
    if !is_installed("curl") {
        return;
    }
    let commands = recipe("sh curl", "post.sh");
    for (answer, status, ready) in [
        ("204 No Content", 0, 0),
        ("422 Unprocessable Content", 65, 0),
        ("404 Not Found", 1, 1),
        ("429 Too Many Requests", 1, 1),
        ("503 Service Unavailable", 1, 1),
        ("302 Found", 1, 1),
    ] {
        let queue = Broker::shared().declare("docs-http").create();
        let commands = commands.replace(HTTP_SERVER, &http_server(answer)).replace("job1-orders", queue.name());
        let finished = run(&commands, &queue);
        assert_eq!(finished.status(), status, "{answer}: {}", finished.stderr);
        queue.wait_ready(ready);
    }
}

#[test]
fn the_retry_queue_ends_at_the_third_failure() {
    let broker = Broker::shared();
    if !broker.is_private() {
        return missing("rabbitmqctl for a broker that the tests haven't started");
    }
    if !is_installed("jq") {
        return;
    }
    let page = "docs/settling-and-retries.md";
    let queue = broker.declare("docs-retry").quorum().create();
    let other = |name: &str| broker.declare("").exact_name(&format!("{}-{name}", queue.name())).create();
    let (retry, dead) = (other("retry"), other("dead"));
    let ours = |text: String| text.replace(QUEUE, queue.name());
    let policies = ours(block_of(page, "sh rabbitmqctl", "set_policy")).replace("30000", "100");
    for policy in policies.lines() {
        let words = format!("rabbitmqctl() {{ printf '%s\\n' \"$@\"; }}; {policy}");
        let words = Program::new("/bin/sh").args(["-c", &words]).run().stdout_text();
        broker.ctl(&words.lines().collect::<Vec<_>>()).expect("the policy can be set");
    }
    let commands = ours(block_of(page, "sh jq", "x-death"));
    let (script, _) = commands.split_once("\nEND\n").expect("the block has a script");
    queue.publish("fig");
    for status in [1, 1, 0] {
        let command = format!("{script}\nEND\nqconsume --max-attempts 1 -- sh three-attempts.sh");
        let finished = run(&command, &queue);
        assert_eq!(finished.status(), status, "{}", finished.stderr);
    }
    assert_eq!(dead.wait_get().text(), "fig");
    queue.wait_ready(0);
    retry.wait_ready(0);
    for policy in [queue.name(), retry.name()] {
        broker.ctl(&["clear_policy", policy]).expect("the policy can be cleared");
    }
}

/// The recipes' image `worker`, with `cat` as the worker; removed when dropped.
struct Image(String);

impl Image {
    /// None if Docker or the base image is missing.
    fn build(name: &str) -> Option<Self> {
        if !docker_works() || !image_present(BASE) {
            missing(&format!("Docker and the image {BASE}"));
            return None;
        }
        let image = Self(format!("qconsume-docs-{name}-{}", std::process::id()));
        let folder = image.folder();
        fs::create_dir_all(&folder).expect("the temporary folder can be written to");
        fs::copy(programs().join("qconsume"), folder.join("qconsume")).expect("qconsume can be copied");
        let file = format!(
            "FROM {BASE}\nCOPY qconsume /usr/bin/qconsume\nRUN ln -s cat /usr/bin/worker.py\n\
             ENTRYPOINT [\"qconsume\", \"--\"]\nCMD [\"/usr/bin/worker.py\"]\n"
        );
        fs::write(folder.join("Dockerfile"), file).expect("the file can be written");
        let label = docker_label().expect("a label");
        let path = folder.display().to_string();
        docker(&["build", "-q", "--label", &label, "-t", &image.0, &path]).unwrap_or_else(|error| panic!("{error:#}"));
        Some(image)
    }

    fn folder(&self) -> PathBuf {
        std::env::temp_dir().join(&self.0)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = docker(&["image", "rm", "-f", &self.0]);
        let _ = fs::remove_dir_all(self.folder());
    }
}

#[track_caller]
fn assert_consumed(queue: &Queue) {
    queue.wait_consumers(0);
    queue.wait_ready(0);
}

#[test]
fn plain_docker_takes_a_message_and_has_its_exit_status() {
    let Some(image) = Image::build("run") else {
        return;
    };
    let label = docker_label().expect("a label");
    let queue = Broker::shared().queue("docs-docker");
    queue.publish("apple");
    let command = recipe("sh docker", "docker run")
        .replace("docker run", &format!("docker run --network host --label {label}"))
        .replace(" worker\n", &format!(" {}\n", image.0))
        .replace(QUEUE, queue.name());
    let run = |wait: &str| {
        Program::new("/bin/sh")
            .args(["-c", &command.replace("-e BROKER_URL", &format!("-e BROKER_URL {wait}"))])
            .url(&Broker::shared().url())
            .spawn()
            .wait(LIMIT)
    };
    let finished = run("");
    assert_eq!(finished.assert_status(0).stdout_text(), "apple");
    assert_consumed(&queue);
    run("-e QCONSUME_WAIT=1s").assert_status(66);
}

#[test]
fn the_compose_recipe_takes_one_message_with_each_of_its_containers() {
    let Some(image) = Image::build("compose") else {
        return;
    };
    let queue = Broker::shared().queue("docs-compose");
    queue.publish_all(["apple"; 8]);
    let file = recipe("yaml", "services:")
        .replace("image: worker ", &format!("network_mode: host\n    image: {} ", image.0))
        .replace("amqp://guest:guest@rabbitmq:5672", &Broker::shared().url())
        .replace(QUEUE, queue.name());
    let path = image.folder().join("compose.yaml");
    fs::write(&path, file).expect("the file can be written");
    let compose = |words: &str| {
        let script = format!(
            "compose=docker-compose; docker compose version >/dev/null 2>&1 && compose='docker compose'; \
             $compose -p {} -f {} {words}",
            image.0,
            path.display()
        );
        Program::new("/bin/sh")
            .args(["-c", &script])
            // The default of docker-compose 1, 60 s, is too short on a busy machine.
            .env("COMPOSE_HTTP_TIMEOUT", "600")
            .spawn()
            .wait(COMPOSE_LIMIT)
    };
    let up = compose("up");
    compose("down").assert_status(0);
    up.assert_status(0);
    let output = up.stdout_text() + &up.stderr;
    assert_eq!(output.matches("exited with code 0").count(), 8, "{output}");
    assert_consumed(&queue);
}
