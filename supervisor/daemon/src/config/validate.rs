//! From the file's tables to checked values.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use plugvisor_package::{Capability, PluginName, TrustTier, VariableName, nearest};
use plugvisor_sandbox::{
    protocol::Control,
    tables::{Problem, Problems, Section, Table, into_table, section},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    BreakerConfig, Config, DirectoryConfig, HealthConfig, LauncherConfig, LimitsConfig, LoadMode, NetworkConfig,
    PluginConfig, RestartConfig, Surroundings, defaults,
    listen::{self, Outer},
    raw,
    show::Places,
};
use crate::logs::FileLimits;
use crate::traces::TraceSettings;

const TIERS: [TrustTier; 5] =
    [TrustTier::Internal, TrustTier::Verified, TrustTier::Community, TrustTier::Untrusted, TrustTier::Quarantined];

/// No setting of time may be longer; a day is beyond every use and far from overflow.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// What could be read, and everything that is wrong.
pub(super) fn parse(text: &str, path: &Path, surroundings: &Surroundings) -> (Config, Vec<Problem>) {
    let mut problems = Problems::new(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        problems.add(&error.span().unwrap_or(0..0), "", error.message());
    }
    let place = path.display().to_string().into();
    let mut config = Config { file: Some(path.to_owned()), place, ..Config::without_file(surroundings) };
    if !errors.is_empty() {
        return (config, problems.into_sorted());
    }
    config.places = Places::of(text, document.get_ref());
    let mut outer = Vec::new();
    let base = path.parent().unwrap_or(Path::new("."));
    for (key, value) in document.into_inner() {
        match key.get_ref().as_ref() {
            "supervisor" => supervisor(&section("supervisor", value, &mut problems), base, &mut config, &mut problems),
            "logs" => logs(&section("logs", value, &mut problems), base, &mut config, &mut problems),
            "launcher" => launcher(&section("launcher", value, &mut problems), base, &mut config, &mut problems),
            "traces" => traces(&section("traces", value, &mut problems), &mut config, &mut problems),
            "directory" => config.directories = directories(value, base, &mut problems),
            "plugin" => config.plugins = plugins(value, surroundings, &mut outer, &mut problems),
            other => {
                let suggestion = nearest(other, ["supervisor", "launcher", "logs", "traces", "directory", "plugin"])
                    .map(str::to_owned);
                let message = "unknown key; the tables are [supervisor], [launcher], [logs], [traces], [[directory]] and [plugin.NAME]";
                problems.suggest(&key.span(), other, message, suggestion);
            }
        }
    }
    listen::conflicts(&outer, (config.supervisor.metrics_address, "supervisor.metrics_address"), &mut problems);
    (config, problems.into_sorted())
}

fn supervisor(table: &Section<raw::Supervisor>, base: &Path, config: &mut Config, problems: &mut Problems<'_>) {
    let raw::Supervisor { runtime_directory, state_directory, metrics_address, user, parallel_starts, allow_degraded } =
        &table.value;
    let settings = &mut config.supervisor;
    if let Some(path) = runtime_directory {
        settings.runtime_directory = absolute(base, path);
    }
    if let Some(path) = state_directory {
        settings.state_directory = absolute(base, path);
    }
    if let Some(text) = metrics_address {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => settings.metrics_address = address,
            Ok(_) => problems.add(
                table.at("metrics_address"),
                table.key("metrics_address"),
                format!("{text:?} is not a loopback address; use 127.0.0.1:PORT or [::1]:PORT"),
            ),
            Err(_) => problems.add(
                table.at("metrics_address"),
                table.key("metrics_address"),
                format!("{text:?} is not an address; write IP:PORT, such as \"127.0.0.1:4001\""),
            ),
        }
    }
    match user.as_deref() {
        None => {}
        Some("") => problems.add(table.at("user"), table.key("user"), "must name a user"),
        Some("root") => {
            let message = "must not be root: the supervisor holds no privilege; name an unprivileged user";
            problems.add(table.at("user"), table.key("user"), message);
        }
        Some(user) => settings.user = user.to_owned(),
    }
    if let Some(starts) = at_least(table, "parallel_starts", *parallel_starts, 1, problems) {
        settings.parallel_starts = starts;
    }
    if let Some(names) = allow_degraded {
        let known = Control::ALL.map(|control| (control.as_str(), control));
        let (key, at) = (table.key("allow_degraded"), table.at("allow_degraded"));
        settings.allow_degraded = named(names, &known, "control", &key, at, problems);
    }
}

fn launcher(table: &Section<raw::Launcher>, base: &Path, config: &mut Config, problems: &mut Problems<'_>) {
    let raw::Launcher { socket, config_root, data_root, linger } = &table.value;
    for (key, root) in [("config_root", config_root), ("data_root", data_root)] {
        if root.is_some() && socket.is_some() {
            let message = "is set where that launcher is started (--config-root, --data-root), when socket names one";
            problems.add(table.at(key), table.key(key), message);
        }
    }
    if let Some(path) = config_root {
        config.config_root = absolute(base, path);
    }
    if let Some(path) = data_root {
        config.data_root = Some(absolute(base, path));
    }
    let time = linger.as_ref().and_then(|text| {
        let time = whole_seconds(text).filter(|time| *time <= LONGEST);
        if time.is_none() {
            let message = format!("{text:?} is no time; write whole seconds up to a day, such as \"30s\" or \"5m\"");
            problems.add(table.at("linger"), table.key("linger"), message);
        }
        time
    });
    match (socket, time) {
        (Some(_), Some(time)) if !time.is_zero() => {
            let message = "is set where that launcher is started (--linger), when socket names one";
            problems.add(table.at("linger"), table.key("linger"), message);
        }
        (Some(path), _) => config.launcher = LauncherConfig::External { socket: absolute(base, path) },
        (None, Some(linger)) => config.launcher = LauncherConfig::Embedded { linger },
        (None, None) => {}
    }
}

/// Reads "30s", "5m" and "1h".
fn whole_seconds(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        _ => return None,
    };
    // No sign: `u64` would take a "+".
    let number = number.bytes().all(|byte| byte.is_ascii_digit()).then_some(number)?;
    Some(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?))
}

fn logs(table: &Section<raw::Logs>, base: &Path, config: &mut Config, problems: &mut Problems<'_>) {
    let raw::Logs { directory, file_bytes, files, total_bytes, lines_per_second, line_bytes } = &table.value;
    let settings = &mut config.logs;
    if let Some(path) = directory {
        settings.directory = Some(absolute(base, path));
    }
    let between = |key, value: Option<u64>, least: u64, most: u64, problems: &mut Problems<'_>| {
        let value = value?;
        if (least..=most).contains(&value) {
            return Some(value);
        }
        problems.add(table.at(key), table.key(key), format!("{value} is not between {least} and {most}"));
        None
    };
    let usual = settings.files;
    let file_bytes = between("file_bytes", *file_bytes, 64 * 1024, 1 << 30, problems).unwrap_or(usual.file_bytes);
    let count = between("files", files.map(u64::from), 0, 100, problems).and_then(|count| u32::try_from(count).ok());
    let total_bytes = between("total_bytes", *total_bytes, 64 * 1024, 1 << 40, problems).unwrap_or(usual.total_bytes);
    settings.files = FileLimits { file_bytes, files: count.unwrap_or(usual.files), total_bytes, ..usual };
    let rate = between("lines_per_second", lines_per_second.map(u64::from), 1, 100_000, problems);
    let bytes = between("line_bytes", line_bytes.map(|bytes| bytes as u64), 128, 64 * 1024, problems);
    let lines = &mut settings.lines;
    lines.lines_per_second = rate.and_then(|rate| u32::try_from(rate).ok()).unwrap_or(lines.lines_per_second);
    lines.line_bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(lines.line_bytes);
}

fn traces(table: &Section<raw::Traces>, config: &mut Config, problems: &mut Problems<'_>) {
    let raw::Traces { endpoint, sample } = &table.value;
    let share = sample.unwrap_or(1.0);
    if !(0.0..=1.0).contains(&share) {
        problems.add(table.at("sample"), table.key("sample"), "must be a share from 0 to 1, such as 0.1");
    }
    let Some(endpoint) = endpoint else {
        if sample.is_some() && table.lacks("endpoint") {
            problems.add(table.at("sample"), table.key("sample"), "says nothing without an endpoint; add one");
        }
        return;
    };
    let is_plain = endpoint
        .parse::<http::Uri>()
        .is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()));
    if is_plain {
        config.traces = Some(TraceSettings { share, ..TraceSettings::to(endpoint) });
    } else {
        let message = format!("{endpoint:?} is no receiver; write http://HOST:PORT, where OTLP over gRPC is received");
        problems.add(table.at("endpoint"), table.key("endpoint"), message);
    }
}

fn directories(value: Spanned<DeValue<'_>>, base: &Path, problems: &mut Problems<'_>) -> Vec<DirectoryConfig> {
    let span = value.span();
    let DeValue::Array(entries) = value.into_inner() else {
        problems.add(&span, "directory", "must be written as [[directory]], once for each directory");
        return Vec::new();
    };
    let mut found: Vec<DirectoryConfig> = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let table: Section<raw::Directory> = section(&format!("directory[{index}]"), entry, problems);
        let raw::Directory { path, tier, grants } = &table.value;
        let tier = tier.as_ref().and_then(|text| {
            let known = TIERS.map(|tier| (tier.as_str(), tier));
            one_of(text, &known, "tier", &table.key("tier"), table.at("tier"), problems)
        });
        let grants = grants.as_ref().map(|names| capabilities(names, &table, problems));
        let Some(path) = path else {
            if table.lacks("path") {
                let message = "is required: the directory whose subdirectories are bundles";
                problems.add(table.at("path"), table.key("path"), message);
            }
            continue;
        };
        let path = absolute(base, path);
        if found.iter().any(|other| other.path == path) {
            problems.add(table.at("path"), table.key("path"), format!("{} is listed twice", path.display()));
            continue;
        }
        let tier = tier.unwrap_or(TrustTier::Untrusted);
        found.push(DirectoryConfig { index, path, tier, grants: grants.unwrap_or_default() });
    }
    found
}

fn plugins(
    value: Spanned<DeValue<'_>>,
    surroundings: &Surroundings,
    outer: &mut Vec<Outer>,
    problems: &mut Problems<'_>,
) -> BTreeMap<PluginName, PluginConfig> {
    let mut found = BTreeMap::new();
    for (key, value) in into_table("plugin", value, problems).unwrap_or_default() {
        let path = format!("plugin.{}", key.get_ref());
        let name = match key.get_ref().parse::<PluginName>() {
            Ok(name) => Some(name),
            Err(error) => {
                problems.add(&key.span(), path.as_str(), error.to_string());
                None
            }
        };
        let config = plugin(&path, value, surroundings, outer, problems);
        found.extend(name.map(|name| (name, config)));
    }
    found
}

fn plugin(
    path: &str,
    value: Spanned<DeValue<'_>>,
    surroundings: &Surroundings,
    outer: &mut Vec<Outer>,
    problems: &mut Problems<'_>,
) -> PluginConfig {
    // The nested tables are read by themselves, so that each of their keys is judged alone too.
    let span = value.span();
    let Some(mut table) = into_table(path, value, problems) else { return PluginConfig::default() };
    let limits = nested(&mut table, path, "limits", problems);
    let listen = listen::taken_from(&mut table, path, outer, problems);
    let network = nested(&mut table, path, "network", problems);
    let restart = nested(&mut table, path, "restart", problems);
    let breaker = nested(&mut table, path, "breaker", problems);
    let health = nested(&mut table, path, "health", problems);
    let table: Section<raw::Plugin> = section(path, Spanned::new(span, DeValue::Table(table)), problems);
    let raw::Plugin {
        load,
        grants,
        config,
        env,
        pass_env,
        limits: None,
        network: None,
        restart: None,
        breaker: None,
        health: None,
    } = &table.value
    else {
        unreachable!("the nested tables were taken out above")
    };
    let load = load.as_ref().and_then(|text| {
        let known = [("auto", LoadMode::Auto), ("manual", LoadMode::Manual)];
        one_of(text, &known, "way to load", &table.key("load"), table.at("load"), problems)
    });
    let mut object = serde_json::Map::new();
    for (key, value) in config.iter().flatten() {
        match json(value) {
            Some(value) => drop(object.insert(key.clone(), value)),
            None => {
                let message = format!("{key} holds nan or inf, which JSON cannot carry to the plugin");
                problems.add(table.at("config"), table.key("config"), message);
            }
        }
    }
    let (environment, unset) = environment(&table, env.as_ref(), pass_env.as_deref(), surroundings, problems);
    PluginConfig {
        load: load.unwrap_or_default(),
        grants: grants.as_ref().map(|names| capabilities(names, &table, problems)),
        config: object,
        environment,
        unset,
        limits: limits.map(|table| limits_config(&table, problems)).unwrap_or_default(),
        network: NetworkConfig { listen, ..network.map(|table| network_config(&table, problems)).unwrap_or_default() },
        restart: restart.map(|table| restart_config(&table, problems)).unwrap_or_default(),
        breaker: breaker.map(|table| breaker_config(&table, problems)).unwrap_or_default(),
        health: health.map(|table| health_config(&table, problems)).unwrap_or_default(),
    }
}

/// The operator's variables: those that are written, then those that are passed on.
fn environment(
    table: &Section<raw::Plugin>,
    env: Option<&BTreeMap<String, String>>,
    pass_env: Option<&[String]>,
    surroundings: &Surroundings,
    problems: &mut Problems<'_>,
) -> (BTreeMap<VariableName, String>, BTreeSet<VariableName>) {
    let written = env.into_iter().flatten().map(|(name, value)| ("env", name, Ok(Some(value.as_str()))));
    let passed = pass_env.into_iter().flatten().map(|name| {
        let value = surroundings.variables.get(OsStr::new(name)).map(|value| value.to_str());
        ("pass_env", name, value.map_or(Ok(None), |value| value.map(Some).ok_or("its own value is not UTF-8")))
    });
    let (mut found, mut unset) = (BTreeMap::new(), BTreeSet::new());
    for (key, text, value) in written.chain(passed) {
        let judged = value.map_err(str::to_owned).and_then(|value| {
            let name = text.parse::<VariableName>().map_err(|why| why.to_string())?;
            value.map_or(Ok(()), VariableName::check_value).map_err(|why| why.to_string())?;
            if found.contains_key(&name) || unset.contains(&name) {
                return Err("it is given twice".to_owned());
            }
            match value {
                Some(value) => drop(found.insert(name, value.to_owned())),
                None => drop(unset.insert(name)),
            }
            Ok(())
        });
        if let Err(why) = judged {
            let shown: String = text.chars().take(64).collect();
            problems.add(table.at(key), table.key(key), format!("{shown:?}: {why}"));
        }
    }
    let bytes: usize = found.iter().map(|(name, value)| name.as_str().len() + value.len() + 2).sum();
    if found.len() + unset.len() > VariableName::MAX_COUNT || bytes > VariableName::MAX_TOTAL {
        let (count, total) = (VariableName::MAX_COUNT, VariableName::MAX_TOTAL);
        let message =
            format!("{} variables of {bytes} bytes; at most {count} of {total} bytes may be set", found.len());
        problems.add(table.at("env"), table.key("env"), message);
    }
    (found, unset)
}

fn nested<'i, T: Table>(
    table: &mut DeTable<'i>,
    path: &str,
    key: &str,
    problems: &mut Problems<'_>,
) -> Option<Section<T>> {
    Some(section(&format!("{path}.{key}"), table.remove(key)?, problems))
}

fn limits_config(table: &Section<raw::Limits>, problems: &mut Problems<'_>) -> LimitsConfig {
    let raw::Limits {
        memory_bytes,
        cpu_percent,
        pids,
        file_size_bytes,
        open_files,
        call_timeout_ms,
        network_bytes_per_second,
    } = table.value;
    LimitsConfig {
        memory_bytes: at_least(table, "memory_bytes", memory_bytes, 1024 * 1024, problems),
        cpu_percent: at_least(table, "cpu_percent", cpu_percent, 1, problems),
        pids: at_least(table, "pids", pids, 1, problems),
        file_size_bytes,
        open_files: at_least(table, "open_files", open_files, 16, problems),
        call_timeout: millis(table, "call_timeout_ms", call_timeout_ms, problems),
        network_bytes: at_least(table, "network_bytes_per_second", network_bytes_per_second, 1, problems),
    }
}

fn network_config(table: &Section<raw::Network>, problems: &mut Problems<'_>) -> NetworkConfig {
    let raw::Network { egress, addresses, listen: None } = &table.value else {
        unreachable!("the entries of listen were taken out above")
    };
    let egress = egress.as_ref().map(|texts| parsed(table, "egress", texts, problems));
    let addresses = addresses.as_ref().map(|texts| parsed(table, "addresses", texts, problems));
    NetworkConfig { egress, addresses: addresses.unwrap_or_default(), listen: Vec::new() }
}

/// A list of texts, each with a grammar of its own.
fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    table: &Section<raw::Network>,
    key: &str,
    texts: &[String],
    problems: &mut Problems<'_>,
) -> Vec<T> {
    let mut one = |text: &String| match text.parse() {
        Ok(value) => Some(value),
        Err(why) => {
            problems.add(table.at(key), table.key(key), format!("{text:?} {why}"));
            None
        }
    };
    texts.iter().filter_map(&mut one).collect()
}

fn restart_config(table: &Section<raw::Restart>, problems: &mut Problems<'_>) -> RestartConfig {
    let raw::Restart { enabled, initial_delay_ms, max_delay_ms, crash_loop_exits, crash_loop_window_ms } = table.value;
    let initial_delay = millis(table, "initial_delay_ms", initial_delay_ms, problems);
    let max_delay = millis(table, "max_delay_ms", max_delay_ms, problems);
    if let (Some(initial), Some(max)) = (initial_delay, max_delay)
        && max < initial
    {
        problems.add(table.at("max_delay_ms"), table.key("max_delay_ms"), "is shorter than initial_delay_ms");
    }
    RestartConfig {
        enabled,
        initial_delay,
        max_delay,
        crash_loop_exits: at_least(table, "crash_loop_exits", crash_loop_exits, 1, problems),
        crash_loop_window: millis(table, "crash_loop_window_ms", crash_loop_window_ms, problems),
    }
}

fn breaker_config(table: &Section<raw::Breaker>, problems: &mut Problems<'_>) -> BreakerConfig {
    let raw::Breaker { enabled, failure_threshold, recovery_timeout_ms, half_open_max_calls } = table.value;
    BreakerConfig {
        enabled,
        failure_threshold: at_least(table, "failure_threshold", failure_threshold, 1, problems),
        recovery_timeout: millis(table, "recovery_timeout_ms", recovery_timeout_ms, problems),
        half_open_max_calls: at_least(table, "half_open_max_calls", half_open_max_calls, 1, problems),
    }
}

fn health_config(table: &Section<raw::Health>, problems: &mut Problems<'_>) -> HealthConfig {
    let raw::Health {
        startup_timeout_ms,
        liveness_interval_ms,
        liveness_timeout_ms,
        liveness_misses,
        readiness_interval_ms,
        drain_timeout_ms,
        stop_timeout_ms,
    } = table.value;
    let mut time = |key, value, default| millis(table, key, value, problems).unwrap_or(default);
    let health = HealthConfig {
        startup_timeout: None,
        liveness_interval: time("liveness_interval_ms", liveness_interval_ms, defaults::LIVENESS_INTERVAL),
        liveness_timeout: time("liveness_timeout_ms", liveness_timeout_ms, defaults::LIVENESS_TIMEOUT),
        liveness_misses: defaults::LIVENESS_MISSES,
        readiness_interval: time("readiness_interval_ms", readiness_interval_ms, defaults::READINESS_INTERVAL),
        drain_timeout: time("drain_timeout_ms", drain_timeout_ms, defaults::DRAIN_TIMEOUT),
        stop_timeout: time("stop_timeout_ms", stop_timeout_ms, defaults::STOP_TIMEOUT),
    };
    HealthConfig {
        startup_timeout: millis(table, "startup_timeout_ms", startup_timeout_ms, problems),
        liveness_misses: at_least(table, "liveness_misses", liveness_misses, 1, problems)
            .unwrap_or(defaults::LIVENESS_MISSES),
        ..health
    }
}

pub(super) fn millis<T>(
    table: &Section<T>,
    key: &str,
    value: Option<u64>,
    problems: &mut Problems<'_>,
) -> Option<Duration> {
    let value = Duration::from_millis(value?);
    if value.is_zero() || value > LONGEST {
        problems.add(table.at(key), table.key(key), "must be between 1 ms and one day (86400000)");
        return None;
    }
    Some(value)
}

fn at_least<T, N: Copy + PartialOrd + std::fmt::Display>(
    table: &Section<T>,
    key: &str,
    value: Option<N>,
    least: N,
    problems: &mut Problems<'_>,
) -> Option<N> {
    let value = value?;
    if value < least {
        problems.add(table.at(key), table.key(key), format!("{value} is too small; the least is {least}"));
        return None;
    }
    Some(value)
}

fn capabilities<T>(names: &[String], table: &Section<T>, problems: &mut Problems<'_>) -> BTreeSet<Capability> {
    let mut one = |name: &String| {
        let found = name.parse().ok();
        if found.is_none() {
            let message = format!("{name:?} is no capability; it is {}", Capability::allowed_for(name));
            problems.add(table.at("grants"), table.key("grants"), message);
        }
        found
    };
    names.iter().filter_map(&mut one).collect()
}

fn named<T: Copy + Ord>(
    names: &[String],
    known: &[(&str, T)],
    what: &str,
    key: &str,
    at: &Range<usize>,
    problems: &mut Problems<'_>,
) -> BTreeSet<T> {
    let mut one = |name: &String| one_of(name, known, what, key, at, problems);
    names.iter().filter_map(&mut one).collect()
}

fn one_of<T: Copy>(
    text: &str,
    known: &[(&str, T)],
    what: &str,
    key: &str,
    at: &Range<usize>,
    problems: &mut Problems<'_>,
) -> Option<T> {
    let found = known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
    if found.is_none() {
        // All of them and no guess: a tier says how far bundles are trusted, and a control which wall may be missing.
        let names = known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        problems.add(at, key, format!("{text:?} is no {what}; it is one of {names}"));
    }
    found
}

fn absolute(base: &Path, path: &Path) -> PathBuf {
    let joined = base.join(path);
    // Lexical only: nothing on disk is touched while the configuration is read. `..` is kept as it is.
    std::path::absolute(&joined).unwrap_or(joined)
}

/// TOML as JSON: times become text; nan and inf have no JSON.
fn json(value: &toml::Value) -> Option<serde_json::Value> {
    Some(match value {
        toml::Value::String(text) => text.as_str().into(),
        toml::Value::Integer(number) => (*number).into(),
        toml::Value::Float(number) => serde_json::Number::from_f64(*number)?.into(),
        toml::Value::Boolean(truth) => (*truth).into(),
        toml::Value::Datetime(time) => time.to_string().into(),
        toml::Value::Array(items) => items.iter().map(json).collect::<Option<Vec<_>>>()?.into(),
        toml::Value::Table(table) => {
            let entries = table.iter().map(|(key, value)| Some((key.clone(), json(value)?)));
            serde_json::Value::Object(entries.collect::<Option<_>>()?)
        }
    })
}
