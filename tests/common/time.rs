//! Time limits and waiting.

use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(5);

/// Long enough for a connection that would come about.
pub const NEVER: Duration = Duration::from_millis(400);

/// Long enough for what works, on a busy machine; what is broken takes all of it.
pub const SOON: Duration = Duration::from_millis(900);
