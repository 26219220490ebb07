//! On a terminal.

use super::*;
use testbed::{missing, owner::find_in_path};

/// Runs its arguments on a terminal of their own, presses Ctrl-C once `running` appears, and says how it ended.
const TERMINAL: &str = r#"
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
seen = b""
pressed = False
while True:
    try:
        piece = os.read(terminal, 4096)
    except OSError:
        break
    if not piece:
        break
    seen += piece
    if not pressed and b"running" in seen:
        os.write(terminal, b"\x03")
        pressed = True
_, status = os.waitpid(pid, 0)
print(seen.decode())
print("ended with", os.waitstatus_to_exitcode(status))
"#;

#[test]
fn ctrl_c_ends_both_once() {
    if find_in_path("python3").is_none() {
        return missing("python3");
    }
    for (script, status) in [
        (WAITS, 130),
        // Counts for a while after the first.
        (
            "n=0; trap 'n=$((n+1))' INT; echo running; while [ $n = 0 ]; do sleep 0.05; done
            for i in 1 2 3 4 5; do sleep 0.1; done; echo interrupted $n time; exit 5",
            5,
        ),
    ] {
        let (queue, proxy) = one_message("terminal", QueueKind::Classic);
        let running = worker(&queue, &proxy)
            .shell(script)
            .through(["python3", "-c", TERMINAL])
            .spawn();
        let text = running.finish(PATIENCE).stdout_text();
        assert!(text.contains(&format!("ended with {status}")), "{text}");
        assert!(
            status == 130 || text.contains("interrupted 1 time"),
            "{text}"
        );
        running.wait_no_leftovers(PROMPT);
        assert_settled(&proxy, Method::BASIC_NACK);
        assert_back(&queue);
    }
}
