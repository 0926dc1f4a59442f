//! Write a plugin as one trait.
