//! The Job controller, with examples/work-queue/job.yaml's `podFailurePolicy`.

/// The failed pods that the Job tolerates; one more fails it.
const BACKOFF_LIMIT: u8 = 1;

/// Statuses with the action `FailJob`: they fail the Job at once.
const FAIL_JOB: [u8; 7] = [64, 65, 66, 77, 78, 126, 127];

/// Statuses with the action `Ignore`: the pod is replaced and not counted.
const IGNORE: [u8; 3] = [69, 71, 75];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    Active,
    Complete,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Job {
    pub completions: u8,
    pub succeeded: u8,
    pub failed: u8,
    pub status: JobStatus,
}

impl Job {
    pub fn new(completions: u8) -> Self {
        Self { completions, succeeded: 0, failed: 0, status: JobStatus::Active }
    }

    pub fn is_active(&self) -> bool {
        self.status == JobStatus::Active
    }

    /// Whether the controller creates a pod. `active` is the number of pods whose end it hasn't seen.
    pub fn wants_pod(&self, active: usize) -> bool {
        self.is_active() && active < usize::from(self.completions - self.succeeded)
    }

    /// The controller sees that a pod has ended; `evicted` is the pod's condition `DisruptionTarget`.
    pub fn observe(&mut self, status: u8, evicted: bool) {
        if !self.is_active() {
            return;
        }
        match status {
            0 => self.succeeded += 1,
            status if FAIL_JOB.contains(&status) => self.status = JobStatus::Failed,
            _ if evicted => {}
            status if IGNORE.contains(&status) => {}
            _ => self.failed += 1,
        }
        if self.failed > BACKOFF_LIMIT {
            self.status = JobStatus::Failed;
        } else if self.succeeded == self.completions {
            self.status = JobStatus::Complete;
        }
    }
}
