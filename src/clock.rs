//! Deadlines that may not be there.

use tokio::time::{Instant, sleep_until};

/// Sleeps until `deadline`, or for ever where there is none.
pub async fn sleep_until_or_never(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
