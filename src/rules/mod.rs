//! Rules: a config (`config`) becomes a plan (`plan`), which the kernel is then
//! made to hold (`apply`), in a slot of its own (`slot`), or which is shown as a
//! script (`render`).

mod apply;
mod config;
mod handle;
mod list;
pub(crate) mod plan;
mod render;
mod slot;

pub use crate::model::{
    Backend, Families, Family, IdRange, MacAddr, Mark, Mode, Options, PortRange, Protocol, Protocols,
};
pub use crate::prefix::Prefix;
pub use apply::{Count, Set, Stats, purge, stats_of};
pub use config::{Config, Listener};
pub use handle::Rules;
pub use list::{Listed, Owner, list};
pub use render::{render_iptables, render_nft};
