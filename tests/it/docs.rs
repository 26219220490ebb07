//! Every command in the documentation is run, or, where it needs Docker, Kubernetes or a build, looked at.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};
use testbed::{Broker, Program, missing, owner::temp_folder};

mod quotes;
mod recording;
mod services;

/// The address that the pages use; the broker's own takes its place.
const ADDRESS: &str = "amqp://guest:guest@localhost:5672";

/// The queue that the pages use; a name of this test's own takes its place.
const QUEUE: &str = "job1";

/// The HTTP server that the pages use; one of this test's own takes its place.
const HTTP_SERVER: &str = "http://worker:8080";

/// What needs a terminal: script(1) is one, on which somebody types "y".
const TERMINAL: &str = "terminal";

/// What isn't run here.
const ELSEWHERE: [&str; 4] = ["docker", "kubectl", "make", "rabbitmqctl"];

/// What the commands of one page may take, generously.
const LIMIT: Duration = Duration::from_secs(600);

/// A fenced block of commands.
struct Block {
    line: usize,
    /// What it needs, if that is more than a shell and a broker: one of `ELSEWHERE`, a program without which it is left
    /// out, or `terminal`.
    needs: Option<String>,
    commands: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> = fs::read_dir(root().join("docs"))
        .expect("there is documentation")
        .map(|entry| entry.expect("it can be listed").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.sort();
    pages.insert(0, root().join("README.md"));
    pages
}

fn name(page: &Path) -> String {
    page.strip_prefix(root()).unwrap_or(page).display().to_string()
}

/// The blocks of commands in a page. Every fence says what it is, and one with commands is `sh`.
fn blocks(page: &Path) -> Vec<Block> {
    let text = fs::read_to_string(page).expect("the page can be read");
    let mut blocks = Vec::new();
    let mut open: Option<Option<Block>> = None;
    for (index, line) in text.lines().enumerate() {
        let Some(info) = line.trim_start().strip_prefix("```") else {
            if let Some(Some(block)) = &mut open {
                block.commands.push_str(line);
                block.commands.push('\n');
            }
            continue;
        };
        if let Some(block) = open.take() {
            blocks.extend(block);
            continue;
        }
        let mut words = info.split_whitespace();
        let language = words.next().unwrap_or_default();
        let known = ["sh", "text", "json", "yaml", "dockerfile", "mermaid", "toml", "python", "ini"];
        assert!(
            known.contains(&language),
            "{}:{}: a fence of {language:?}, which nobody checks; commands are sh",
            name(page),
            index + 1
        );
        open = Some((language == "sh").then(|| Block {
            line: index + 1,
            needs: words.next().map(str::to_owned),
            commands: String::new(),
        }));
    }
    assert!(open.is_none(), "{}: a fence stays open", name(page));
    blocks
}

/// A folder with what the pages take for granted.
fn sandbox() -> PathBuf {
    let folder = temp_folder("docs");
    for file in ["tasks.txt", "image1.png", "image2.png"] {
        fs::write(folder.join(file), "one\ntwo\n").expect("it can be written");
    }
    std::os::unix::fs::symlink(root().join("examples"), folder.join("examples")).expect("it can be linked");
    folder
}

impl Block {
    fn can_run(&self) -> bool {
        let Some(needs) = self.needs.as_deref() else {
            return true;
        };
        !ELSEWHERE.contains(&needs) && is_installed(if needs == TERMINAL { "script" } else { needs })
    }
}

/// Whether there is a program of this name; says so if there is none.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        missing(program);
    }
    found
}

/// A server that reads each request with its body and answers this, until the test ends; a form it doesn't take.
fn http_server(status: &'static str) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("there is a free port");
    let address = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.expect("it connects"));
            let (mut line, mut length, mut status) = (String::new(), 0, status);
            while stream.read_line(&mut line).is_ok_and(|read| read > 2) {
                let lower = line.to_ascii_lowercase();
                if let Some(value) = lower.strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length is a number");
                }
                if lower.starts_with("content-type:") && lower.contains("form") {
                    status = "415 Unsupported Media Type";
                }
                line.clear();
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).expect("the body is there");
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.get_mut().write_all(answer.as_bytes()).expect("it is read");
        }
    });
    format!("http://{address}")
}

/// Runs a page's blocks in one shell, in order, as a reader would.
fn run(page: &Path, blocks: &[&Block]) {
    let broker = Broker::shared();
    let queue = broker.declare("docs").quorum().create();
    queue.publish_all(["apple", "banana", "cherry"]);
    let mut script = String::from("set -eu\n");
    for block in blocks {
        script.push_str(&format!("echo '### line {}' >&2\n", block.line));
        if block.needs.as_deref() == Some(TERMINAL) {
            script.push_str(&format!("cat >on-terminal <<'END'\n{}END\n", block.commands));
            script.push_str("echo y | script -qec 'sh -eu on-terminal' /dev/null\n");
        } else {
            script.push_str(&block.commands);
        }
    }
    let url = broker.url();
    let script =
        script.replace(ADDRESS, &url).replace(QUEUE, queue.name()).replace(HTTP_SERVER, &http_server("200 OK"));
    let path = std::env::var("PATH").unwrap_or_default();
    let finished = Program::new("/bin/sh")
        .args(["-c", &script])
        .url(&url)
        .queue(queue.name())
        .env("PATH", format!("{}:{path}", programs().display()))
        .current_dir(sandbox())
        .spawn()
        .wait(LIMIT);
    assert_eq!(
        finished.status(),
        0,
        "{}: the commands of the last line named here failed:\n{}",
        name(page),
        finished.stderr
    );
    // Queues that the commands have declared beside it.
    for line in script.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-')) {
        if line.starts_with(queue.name()) {
            let channel = broker.client().channel().unwrap();
            let deleted = channel.queue_delete(line.into(), Default::default());
            let _ = testbed::block_on(deleted);
        }
    }
}

#[test]
fn the_commands_of_every_page_work() {
    std::thread::scope(|scope| {
        for page in pages() {
            scope.spawn(move || {
                let blocks = blocks(&page);
                let run_here: Vec<_> = blocks.iter().filter(|block| block.can_run()).collect();
                if !run_here.is_empty() {
                    run(&page, &run_here);
                }
            });
        }
    });
}

/// What isn't run here: its programs are the ones named, its files are there, its targets are make's.
#[test]
fn commands_for_elsewhere_name_files_and_targets_that_are_there() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("there is a Makefile");
    for page in pages() {
        for block in blocks(&page) {
            let Some(needs) = &block.needs else { continue };
            if !ELSEWHERE.contains(&needs.as_str()) {
                continue;
            }
            let place = format!("{}:{}", name(&page), block.line);
            let commands = block.commands.replace("\\\n", " ");
            for command in commands.lines() {
                let command = command.split(" #").next().unwrap_or_default().trim();
                let words: Vec<&str> = command.split_whitespace().collect();
                let Some(program) = words.first() else {
                    continue;
                };
                assert!(
                    program == needs || ["qpublish", "qconsume", "export", "cd"].contains(program),
                    "{place}: {command:?} doesn't need {needs}"
                );
                for word in &words {
                    let file = word.trim_start_matches("./");
                    if file.starts_with("examples/") || file.starts_with("docker/") {
                        assert!(root().join(file).exists(), "{place}: {file} isn't there");
                    }
                }
                if needs == "make" {
                    for target in &words[1..] {
                        assert!(makefile.contains(&format!("\n{target}:")), "{place}: make has no {target}");
                    }
                }
            }
        }
    }
}

/// GitHub shows a drawing with a semicolon in a label as a syntax error: to Mermaid that is the end of a line.
#[test]
fn drawings_have_no_semicolons() {
    let mut drawings = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).expect("the page can be read");
        for rest in text.split("```mermaid\n").skip(1) {
            let drawing = rest.split("```").next().unwrap_or_default();
            assert!(!drawing.contains(';'), "{}:\n{drawing}", name(&page));
            drawings += 1;
        }
    }
    assert!(drawings >= 2, "the drawings are not found any more");
}

/// A link to a file of ours leads to one.
#[test]
fn links_between_the_pages_lead_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(&page).expect("the page can be read");
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let file = page.parent().expect("it is in a folder").join(target.replace('\n', " "));
            assert!(file.exists(), "{}: {target} isn't there", name(&page));
        }
    }
}

/// Where the programs are that the tests run.
fn programs() -> PathBuf {
    let mut program = crate::common::qconsume_path();
    program.pop();
    program
}
