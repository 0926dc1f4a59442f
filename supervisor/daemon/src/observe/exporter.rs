//! Counters of the supervisor's own, kept by the metrics exporter. They last as long as the process; what comes and goes
//! with plugins is rendered by [`super::exposition`] instead.

use metrics::{Key, Label, Level, Metadata, Recorder as _};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};

const EVENTS: &str = "plugvisor_events_total";

/// The counters. Not the process-wide recorder: two supervisors in one process (in tests) do not mix.
pub struct Counters {
    recorder: PrometheusRecorder,
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counters").finish_non_exhaustive()
    }
}

impl Counters {
    /// Everything at 0.
    #[must_use]
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        recorder.describe_counter(EVENTS.into(), None, "Events published, by type.".into());
        Self { recorder }
    }

    /// One more event of this type.
    pub fn event(&self, type_name: &str) {
        let metadata = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));
        let key = Key::from_parts(EVENTS, vec![Label::new("type", type_name.to_owned())]);
        self.recorder.register_counter(&key, &metadata).increment(1);
    }

    /// The counters in the text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.recorder.handle().render()
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_and_render() {
        let counters = Counters::new();
        counters.event("io.plugvisor.x.v1");
        counters.event("io.plugvisor.x.v1");
        let page = counters.render();
        assert!(page.contains("# TYPE plugvisor_events_total counter\n"), "{page}");
        assert!(page.contains("plugvisor_events_total{type=\"io.plugvisor.x.v1\"} 2\n"), "{page}");
    }
}
