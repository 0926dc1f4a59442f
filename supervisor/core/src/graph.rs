//! In which order plugins are loaded and unloaded, from what they depend on and from their `loadOrder`.
//!
//! Owns the order alone: whether a dependency is loaded, and waiting for it, is its user's business.

use std::collections::{BTreeMap, BTreeSet};

use plugvisor_package::PluginName;

/// What one plugin says about its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Whom it depends on.
    pub dependencies: Vec<PluginName>,
    /// Its `loadOrder`, or 0.
    pub load_order: i32,
}

/// The plugins of a host and whom each depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    nodes: BTreeMap<PluginName, Node>,
}

impl Graph {
    /// The graph of these plugins.
    #[must_use]
    pub fn new(nodes: impl IntoIterator<Item = (PluginName, Node)>) -> Self {
        Self { nodes: nodes.into_iter().collect() }
    }

    /// Every plugin, each behind whom it depends on; of those that could come next the one with the lowest
    /// `loadOrder`, then the first by name. Members of circles and their dependents, which can never be loaded, are
    /// last. Dependencies that are not there hold nobody back here.
    #[must_use]
    pub fn order(&self) -> Vec<&PluginName> {
        let mut left: BTreeMap<&PluginName, usize> = BTreeMap::new();
        let mut dependents: BTreeMap<&PluginName, Vec<&PluginName>> = BTreeMap::new();
        for (name, node) in &self.nodes {
            let there: BTreeSet<&PluginName> =
                node.dependencies.iter().filter(|dependency| self.nodes.contains_key(*dependency)).collect();
            left.insert(name, there.len());
            for dependency in there {
                dependents.entry(dependency).or_default().push(name);
            }
        }
        let key = |name: &&PluginName| self.nodes.get(*name).map_or(0, |node| node.load_order);
        let mut free: BTreeSet<(i32, &PluginName)> =
            left.iter().filter(|(_, count)| **count == 0).map(|(name, _)| (key(name), *name)).collect();
        let mut order = Vec::with_capacity(self.nodes.len());
        while let Some((_, name)) = free.pop_first() {
            left.remove(name);
            order.push(name);
            for dependent in dependents.get(name).into_iter().flatten() {
                if let Some(count) = left.get_mut(dependent) {
                    *count -= 1;
                    if *count == 0 {
                        free.insert((key(dependent), *dependent));
                    }
                }
            }
        }
        order.extend(left.into_keys());
        order
    }

    /// The shortest way from a plugin over its dependencies back to itself; the first name is also the last.
    #[must_use]
    pub fn circle(&self, name: &PluginName) -> Option<Vec<PluginName>> {
        let mut paths = std::collections::VecDeque::from([vec![name]]);
        let mut seen = BTreeSet::new();
        while let Some(path) = paths.pop_front() {
            let last = path.last().and_then(|last| self.nodes.get(*last));
            for dependency in last.into_iter().flat_map(|node| &node.dependencies) {
                let mut longer = path.clone();
                longer.push(dependency);
                if dependency == name {
                    return Some(longer.into_iter().cloned().collect());
                }
                if seen.insert(dependency) {
                    paths.push_back(longer);
                }
            }
        }
        None
    }

    /// Everyone who depends on a plugin, through others too, in the order in which they must be unloaded before it.
    #[must_use]
    pub fn dependents(&self, name: &PluginName) -> Vec<&PluginName> {
        let mut found = BTreeSet::from([name]);
        // As long as somebody new is found; a plugin joins once.
        loop {
            let before = found.len();
            for (other, node) in &self.nodes {
                if node.dependencies.iter().any(|dependency| found.contains(dependency)) {
                    found.insert(other);
                }
            }
            if found.len() == before {
                break;
            }
        }
        self.order().into_iter().rev().filter(|other| *other != name && found.contains(*other)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Graph, Node};

    fn graph(nodes: &[(&str, i32, &[&str])]) -> Graph {
        Graph::new(nodes.iter().map(|(name, load_order, dependencies)| {
            let dependencies = dependencies.iter().map(|name| name.parse().unwrap()).collect();
            (name.parse().unwrap(), Node { dependencies, load_order: *load_order })
        }))
    }

    fn texts<'a>(names: impl IntoIterator<Item = &'a super::PluginName>) -> Vec<&'a str> {
        names.into_iter().map(super::PluginName::as_str).collect()
    }

    #[test]
    fn dependencies_outweigh_load_order_and_load_order_outweighs_names() {
        let graph = graph(&[
            ("a", 0, &["z"]),
            ("b", 5, &[]),
            ("c", -1, &[]),
            ("d", 0, &["missing"]),
            ("z", 9, &[]),
            ("y", -3, &["z"]),
        ]);
        assert_eq!(texts(graph.order()), ["c", "d", "b", "z", "y", "a"]);
    }

    #[test]
    fn a_circle_is_named_and_its_members_come_last() {
        let graph =
            graph(&[("a", 0, &["b"]), ("b", 0, &["c", "a"]), ("c", 0, &["a"]), ("d", 0, &["a"]), ("e", 7, &[])]);
        let name = |text: &str| text.parse().unwrap();
        assert_eq!(texts(&graph.circle(&name("a")).unwrap()), ["a", "b", "a"]);
        assert_eq!(texts(&graph.circle(&name("c")).unwrap()), ["c", "a", "b", "c"]);
        assert_eq!(graph.circle(&name("d")), None, "it only leads into one");
        assert_eq!(texts(graph.order()), ["e", "a", "b", "c", "d"]);
    }

    #[test]
    fn dependents_are_unloaded_from_the_far_end() {
        let graph =
            graph(&[("db", 0, &[]), ("api", 0, &["db"]), ("web", 0, &["api"]), ("cron", 0, &["db"]), ("x", 0, &[])]);
        assert_eq!(texts(graph.dependents(&"db".parse().unwrap())), ["web", "cron", "api"]);
        assert!(graph.dependents(&"web".parse().unwrap()).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the graph: everyone once, and nobody before a dependency unless it cannot be loaded at all.
        #[test]
        fn every_order_is_one(edges in prop::collection::vec((0..9_usize, 0..9_usize), 0..24), orders in prop::collection::vec(-2..3_i32, 9)) {
            let name = |number: usize| format!("p{number}").parse::<super::PluginName>().unwrap();
            let graph = Graph::new((0..9).map(|number| {
                let dependencies = edges.iter().filter(|(from, _)| *from == number).map(|(_, to)| name(*to)).collect();
                (name(number), Node { dependencies, load_order: orders[number] })
            }));
            let order = graph.order();
            prop_assert_eq!(order.len(), 9);
            let place = |wanted: &super::PluginName| order.iter().position(|name| *name == wanted).unwrap();
            let circular = |name: &super::PluginName| graph.circle(name).is_some();
            for (from, to) in &edges {
                let (from, to) = (name(*from), name(*to));
                // Who reaches a circle can never be loaded.
                let doomed = (0..9).map(name).any(|other| circular(&other) && (other == from || graph.dependents(&other).contains(&&from)));
                prop_assert!(doomed || place(&to) < place(&from), "{} before {}", from, to);
                prop_assert!(from == to || circular(&from) && circular(&to) || graph.dependents(&to).contains(&&from));
            }
        }
    }
}
