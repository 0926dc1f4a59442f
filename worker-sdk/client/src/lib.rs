//! Calls to plugins from a local application.
