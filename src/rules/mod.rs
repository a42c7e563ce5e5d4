//! Rules: a wish (`config`) becomes a plan (`plan`), which the kernel is then
//! made to hold (`apply`).

mod apply;
mod config;
mod plan;

pub use crate::model::{Families, Family, Mark, PortRange, Protocol};
pub use apply::Rules;
pub use config::{Config, Listener};
