//! Rules: a wish (`config`) becomes a plan (`plan`), which the kernel is then
//! made to hold (`apply`), in a place of its own (`place`).

mod apply;
mod config;
mod place;
mod plan;

pub use crate::model::{Families, Family, Mark, Mode, PortRange, Protocol, Protocols};
pub use crate::prefix::Prefix;
pub use apply::{Count, Rules, Set, Stats, purge};
pub use config::{Config, Listener};
