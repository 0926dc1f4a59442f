//! Plugins that do real work.
