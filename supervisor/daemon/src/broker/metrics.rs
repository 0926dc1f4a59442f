//! The broker's own figures, counted in cells on its thread and copied out on request.
//!
//! Names of plugins come from the operator's directories and are therefore few; names of methods come from callers, so
//! a method gets figures of its own only once its provider has shown that it exists, up to a number of them.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::Duration,
};

use plugvisor_core::route::Reason;

use super::snapshot::{CallSeries, DURATION_BOUNDS, RejectedSeries, STATUS_CODES};

const OTHER: &str = "other";
const UNIMPLEMENTED: usize = 12;

/// Numbers a caller's name, so that series are found without hashing text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CallerKey(usize);

#[derive(Debug, Default)]
struct Series {
    by_code: [Cell<u64>; STATUS_CODES],
    durations: [Cell<u64>; DURATION_BOUNDS.len() + 1],
    sum: Cell<Duration>,
}

type ByCaller = HashMap<CallerKey, Series>;

#[derive(Debug)]
struct CallerFigures {
    name: String,
    /// In the order of [`Reason::ALL`].
    rejected: [Cell<u64>; Reason::ALL.len()],
}

/// The figures of all callers and all providers' methods.
#[derive(Debug)]
pub(super) struct Metrics {
    max_methods: usize,
    callers: RefCell<Vec<Rc<CallerFigures>>>,
    providers: RefCell<HashMap<String, Rc<ProviderMetrics>>>,
}

/// The figures of one provider, by method and caller; shared by its generations.
#[derive(Debug, Default)]
pub(super) struct ProviderMetrics {
    methods: RefCell<HashMap<Box<str>, ByCaller>>,
}

impl Metrics {
    pub(super) fn new(max_methods: usize) -> Self {
        Self { max_methods, callers: RefCell::default(), providers: RefCell::default() }
    }

    pub(super) fn caller(&self, name: &str) -> CallerKey {
        let mut callers = self.callers.borrow_mut();
        let known = callers.iter().position(|figures| figures.name == name);
        CallerKey(known.unwrap_or_else(|| {
            callers.push(Rc::new(CallerFigures { name: name.to_owned(), rejected: Default::default() }));
            callers.len() - 1
        }))
    }

    pub(super) fn provider(&self, name: &str) -> Rc<ProviderMetrics> {
        Rc::clone(self.providers.borrow_mut().entry(name.to_owned()).or_default())
    }

    pub(super) fn rejected(&self, caller: CallerKey, reason: Reason) {
        let index = Reason::ALL.iter().position(|each| *each == reason);
        if let (Some(figures), Some(index)) = (self.callers.borrow().get(caller.0), index) {
            bump(&figures.rejected[index]);
        }
    }

    /// Counts a call that ended, under `Service/Method`.
    pub(super) fn finished(
        &self,
        provider: &ProviderMetrics,
        caller: CallerKey,
        method: &str,
        code: i32,
        duration: Duration,
    ) {
        let code = usize::try_from(code).ok().filter(|code| *code < STATUS_CODES).unwrap_or(2);
        let mut methods = provider.methods.borrow_mut();
        let series = if let Some(callers) = methods.get_mut(method) {
            callers.entry(caller).or_default()
        } else {
            // One more than the number of methods, because `other` is an entry too.
            let name = if code == UNIMPLEMENTED || methods.len() > self.max_methods { OTHER } else { method };
            methods.entry(name.into()).or_default().entry(caller).or_default()
        };
        bump(&series.by_code[code]);
        let bucket = DURATION_BOUNDS.iter().position(|bound| duration <= *bound).unwrap_or(DURATION_BOUNDS.len());
        bump(&series.durations[bucket]);
        series.sum.set(series.sum.get().saturating_add(duration));
    }

    pub(super) fn calls(&self) -> Vec<CallSeries> {
        let callers = self.callers.borrow();
        let mut all = Vec::new();
        for (provider, figures) in &*self.providers.borrow() {
            for (method, by_caller) in &*figures.methods.borrow() {
                for (caller, series) in by_caller {
                    all.push(CallSeries {
                        caller: callers.get(caller.0).map_or_else(String::new, |figures| figures.name.clone()),
                        provider: provider.clone(),
                        method: method.to_string(),
                        by_code: series.by_code.each_ref().map(Cell::get),
                        durations: series.durations.each_ref().map(Cell::get),
                        duration_sum: series.sum.get(),
                    });
                }
            }
        }
        all
    }

    pub(super) fn rejections(&self) -> Vec<RejectedSeries> {
        let callers = self.callers.borrow();
        let counted = callers.iter().flat_map(|figures| {
            Reason::ALL.iter().zip(&figures.rejected).map(|(reason, count)| RejectedSeries {
                caller: figures.name.clone(),
                reason: reason.as_str(),
                count: count.get(),
            })
        });
        counted.filter(|series| series.count > 0).collect()
    }
}

fn bump(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Metrics;

    #[test]
    fn callers_cannot_make_series_at_will() {
        let metrics = Metrics::new(2);
        let caller = metrics.caller("a");
        let provider = metrics.provider("p");
        for (method, code) in [("S/Guessed", 12), ("S/One", 0), ("S/Two", 5), ("S/Three", 0), ("S/Four", 0)] {
            metrics.finished(&provider, caller, method, code, Duration::from_micros(70));
        }
        let mut seen: Vec<(String, u64)> =
            metrics.calls().into_iter().map(|series| (series.method, series.by_code.iter().sum())).collect();
        seen.sort();
        assert_eq!(seen, [("S/One".into(), 1), ("S/Two".into(), 1), ("other".into(), 3)]);
    }

    #[test]
    fn a_name_keeps_its_figures_over_generations() {
        let metrics = Metrics::new(2);
        for _generation in 0..2 {
            let caller = metrics.caller("a");
            metrics.finished(&metrics.provider("p"), caller, "S/M", 0, Duration::from_secs(60));
        }
        let calls = metrics.calls();
        assert_eq!(calls.len(), 1);
        assert_eq!(calls[0].by_code[0], 2);
        assert_eq!(calls[0].durations.last(), Some(&2));
        assert_eq!(calls[0].duration_sum, Duration::from_secs(120));
    }
}
