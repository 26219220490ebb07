//! Runs every command in the documentation, except for those that need Docker, Kubernetes or a build: for these, checks
//! that the files and targets that they name exist.

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

/// The broker's address in the pages; replaced by the test broker's.
const ADDRESS: &str = "amqp://guest:guest@localhost:5672";

/// The queue in the pages; replaced by a queue of the test.
const QUEUE: &str = "job1";

/// The HTTP server in the pages; replaced by a server of the test.
const HTTP_SERVER: &str = "http://worker:8080";

/// Marks commands that need a terminal. They run in script(1), with "y" as the input.
const TERMINAL: &str = "terminal";

/// Programs whose commands aren't run here.
const ELSEWHERE: [&str; 4] = ["docker", "kubectl", "make", "rabbitmqctl"];

/// For all commands of one page; generous.
const LIMIT: Duration = Duration::from_secs(600);

/// A fenced block of commands.
struct Block {
    line: usize,
    /// If it needs more than a shell and a broker: one of `ELSEWHERE`, `terminal`, or a program (if that isn't
    /// installed, the block is skipped).
    needs: Option<String>,
    commands: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> = fs::read_dir(root().join("docs"))
        .expect("there is documentation")
        .map(|entry| entry.expect("the folder can be listed").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.sort();
    pages.insert(0, root().join("README.md"));
    pages
}

fn name(page: &Path) -> String {
    page.strip_prefix(root()).unwrap_or(page).display().to_string()
}

/// The blocks of commands in a page. Every fence names its language; `sh` means commands.
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
            "{}:{}: unknown language {language:?} of a fence; commands are sh",
            name(page),
            index + 1
        );
        open = Some((language == "sh").then(|| Block {
            line: index + 1,
            needs: words.next().map(str::to_owned),
            commands: String::new(),
        }));
    }
    assert!(open.is_none(), "{}: a fence isn't closed", name(page));
    blocks
}

/// A folder with the files that the pages' commands use.
fn sandbox() -> PathBuf {
    let folder = temp_folder("docs");
    for file in ["tasks.txt", "image1.png", "image2.png"] {
        fs::write(folder.join(file), "one\ntwo\n").expect("the file can be written");
    }
    std::os::unix::fs::symlink(root().join("examples"), folder.join("examples")).expect("the folder can be linked");
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

/// Whether PATH has this program; reports it as missing otherwise.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        missing(program);
    }
    found
}

/// Starts a server that reads each request with its body, and answers with this status, or with 415 if the body is a
/// form. Returns its URL.
fn http_server(status: &'static str) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("there is a free port");
    let address = listener.local_addr().expect("the listener has an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.expect("the client connects"));
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
            stream.get_mut().write_all(answer.as_bytes()).expect("the answer can be written");
        }
    });
    format!("http://{address}")
}

/// Runs a page's blocks in one shell, in their order.
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
    assert_eq!(finished.status(), 0, "{}: the block at the last \"### line\" failed:\n{}", name(page), finished.stderr);
    // Deletes the queues that the commands have declared.
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

/// Checks commands that aren't run: the fence names their program, and their files and make targets exist.
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
                    "{place}: the fence is for {needs}, but has {command:?}"
                );
                for word in &words {
                    let file = word.trim_start_matches("./");
                    if file.starts_with("examples/") || file.starts_with("docker/") {
                        assert!(root().join(file).exists(), "{place}: {file} doesn't exist");
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

/// For Mermaid a semicolon ends a line, so GitHub shows a drawing with one in a label as a syntax error.
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
    assert!(drawings >= 2, "only {drawings} drawings were found");
}

/// Links to files of this repository.
#[test]
fn links_between_the_pages_lead_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(&page).expect("the page can be read");
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let file = page.parent().expect("the page is in a folder").join(target.replace('\n', " "));
            assert!(file.exists(), "{}: {target} doesn't exist", name(&page));
        }
    }
}

/// The folder of the programs under test.
fn programs() -> PathBuf {
    let mut program = crate::common::qconsume_path();
    program.pop();
    program
}
