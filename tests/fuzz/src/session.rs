//! A run of many inputs against one target.
//!
//! It begins with the corpus. Each further input is one that it has, changed; an input with a shape that was not seen
//! before is kept to be changed in turn. The seed decides everything.

use std::{
    collections::HashSet,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::{
    Shape, Target, corpus,
    mutate::{Chance, change, words},
};

/// Inputs that are kept to be changed; far more than there are shapes.
const KEPT: usize = 4096;
/// Tries to make a failing input smaller.
const SMALLER: usize = 2000;

/// What many inputs led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Inputs tried, the corpus not counted.
    pub runs: u64,
    /// Different shapes seen, the corpus' own counted.
    pub shapes: usize,
}

/// An input that breaks a property.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The input, made as small as it could be.
    pub input: Vec<u8>,
    /// What the target said of it.
    pub why: String,
}

/// A target with what is known about it so far.
#[derive(Debug)]
pub struct Session {
    target: Target,
    chance: Chance,
    inputs: Vec<Vec<u8>>,
    words: Vec<Box<[u8]>>,
    shapes: HashSet<Shape>,
}

impl Session {
    /// Reads the corpus and tries each of its inputs.
    ///
    /// # Errors
    /// When the corpus cannot be read.
    ///
    /// # Panics
    /// When an input of the corpus breaks a property.
    pub fn new(target: Target, seed: u64) -> io::Result<Self> {
        let inputs: Vec<Vec<u8>> = corpus(target)?.into_iter().map(|(_, input)| input).collect();
        let shapes = inputs.iter().map(|input| target.check(input)).collect();
        Ok(Self { target, chance: Chance::new(seed), words: words(&inputs), inputs, shapes })
    }

    /// Tries so many inputs.
    ///
    /// # Errors
    /// The first input that broke a property.
    pub fn run(&mut self, runs: u64) -> Result<Report, Box<Finding>> {
        for _ in 0..runs {
            let mut input = self.any();
            let other = self.any();
            change(&mut self.chance, &mut input, &self.words, &other, self.target.longest());
            let shape = attempt(self.target, &input)
                .map_err(|why| Box::new(Finding { input: smaller(self.target, &input), why }))?;
            if self.shapes.insert(shape) && self.inputs.len() < KEPT {
                self.inputs.push(input);
            }
        }
        Ok(Report { runs, shapes: self.shapes.len() })
    }

    fn any(&mut self) -> Vec<u8> {
        let at = self.chance.below(self.inputs.len());
        self.inputs.get(at).cloned().unwrap_or_default()
    }
}

/// Tries one input; what the target said when it panicked.
fn attempt(target: Target, input: &[u8]) -> Result<Shape, String> {
    catch_unwind(AssertUnwindSafe(|| target.check(input))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_else(|| "a panic".to_owned())
    })
}

/// Leaves out of a failing input what it fails without.
fn smaller(target: Target, input: &[u8]) -> Vec<u8> {
    let mut best = input.to_vec();
    let mut piece = best.len() / 2;
    let mut left = SMALLER;
    while piece > 0 && left > 0 {
        let mut at = 0;
        while at < best.len() && left > 0 {
            left -= 1;
            let mut tried = best.clone();
            tried.drain(at..(at + piece).min(best.len()));
            if attempt(target, &tried).is_err() {
                best = tried;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    best
}
