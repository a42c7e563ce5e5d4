//! Time limits and waiting.
//!
//! Every time limit of the Rust tests, those in `src` too, comes from [`limit`]. The environment variable TPROXY_TEST_TIME_FACTOR stretches all
//! of them, for slow or emulated machines.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// A time limit in milliseconds, multiplied by TPROXY_TEST_TIME_FACTOR (default: 1).
pub fn limit(milliseconds: u64) -> Duration {
    static FACTOR: LazyLock<f64> = LazyLock::new(|| match std::env::var("TPROXY_TEST_TIME_FACTOR") {
        Ok(text) => match text.parse() {
            Ok(factor) if (0.1..=1000.0).contains(&factor) => factor,
            _ => panic!("TPROXY_TEST_TIME_FACTOR is {text:?}; it must be a number from 0.1 to 1000"),
        },
        Err(_) => 1.0,
    });
    Duration::from_millis(milliseconds).mul_f64(*FACTOR)
}

/// How long a test waits for an event that must happen. A test that passes does not wait so long.
pub fn patience() -> Duration {
    limit(20_000)
}

/// How long a test waits for an event that must not happen. It is shorter than the second after which TCP sends a first
/// packet again.
pub fn silence() -> Duration {
    limit(800)
}

/// Waits between two looks at something that changes by itself.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// Waits until the function gives something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {:?} in vain: {what}", patience());
        pause();
    }
}

/// Waits until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}
