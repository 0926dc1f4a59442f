//! Golden texts of what people see, and that a full file comes through.

use std::path::{Path, PathBuf};

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/plugvisor/plugvisor.toml"), &Surroundings { uid: 0, ..Default::default() })
}

fn problems(text: &str) -> String {
    parse(text).expect_err("the text has problems").to_string()
}

#[test]
fn a_full_file_comes_through() {
    let config = parse(
        r#"
        [supervisor]
        runtime_directory = "/run/other"
        state_directory = "state"
        metrics_address = "[::1]:0"
        user = "plugvisor"
        allow_degraded = ["memory-limit", "cpu-limit"]

        [[directory]]
        path = "bundles"
        tier = "verified"
        grants = ["api:internal-calls"]

        [plugin.gallery]
        load = "manual"
        grants = []
        config = { title = "Holidays", columns = 3, since = 2024-01-02 }
        [plugin.gallery.limits]
        memory_bytes = 67108864
        call_timeout_ms = 2500
        [plugin.gallery.restart]
        enabled = false
        [plugin.gallery.breaker]
        failure_threshold = 2
        [plugin.gallery.health]
        liveness_misses = 9
        stop_timeout_ms = 50
        "#,
    )
    .unwrap();
    assert_eq!(config.supervisor.runtime_directory, Path::new("/run/other"));
    assert_eq!(config.supervisor.state_directory, Path::new("/etc/plugvisor/state"));
    assert_eq!(config.supervisor.metrics_address, "[::1]:0".parse().unwrap());
    assert_eq!(config.supervisor.user, "plugvisor");
    assert_eq!(config.supervisor.allow_degraded, BTreeSet::from([Control::MemoryLimit, Control::CpuLimit]));
    assert_eq!(
        config.directories,
        [DirectoryConfig {
            index: 0,
            path: PathBuf::from("/etc/plugvisor/bundles"),
            tier: TrustTier::Verified,
            grants: BTreeSet::from([Capability::InternalCalls]),
        }]
    );
    let gallery = config.plugin(&"gallery".parse().unwrap());
    assert_eq!(gallery.load, LoadMode::Manual);
    assert_eq!(gallery.grants, Some(BTreeSet::new()));
    let expected = serde_json::json!({ "title": "Holidays", "columns": 3, "since": "2024-01-02" });
    assert_eq!(serde_json::Value::Object(gallery.config), expected);
    assert_eq!(gallery.limits.memory_bytes, Some(64 << 20));
    assert_eq!(gallery.limits.call_timeout, Some(Duration::from_millis(2500)));
    assert_eq!(gallery.restart.enabled, Some(false));
    assert_eq!(gallery.breaker.failure_threshold, Some(2));
    let health = HealthConfig { liveness_misses: 9, stop_timeout: Duration::from_millis(50), ..Default::default() };
    assert_eq!(gallery.health, health);
    assert_eq!(config.plugin(&"other".parse().unwrap()), PluginConfig::default());
}

#[test]
fn every_problem_is_reported_with_its_line_and_a_suggestion() {
    let text = r#"[supervisor]
metrics_adress = "127.0.0.1:4001"
user = "root"
allow_degraded = ["memory-limt"]

[[directory]]
path = "/srv/bundles"
tier = "verifed"
grants = ["api:internal-call"]

[[directory]]
tier = "internal"

[plugin.Gallery]
load = "auto"

[plugin.gallery]
lod = "auto"
config = { ratio = nan }
[plugin.gallery.limits]
memory_bytes = "64M"
cpu_percent = 0
[plugin.gallery.health]
liveness_timeout_ms = 0

[plugins]
"#;
    let expected = r#"the configuration /etc/plugvisor/plugvisor.toml has 13 problems:
  line 2: supervisor.metrics_adress: unknown key; did you mean "metrics_address"?
  line 3: supervisor.user: must not be root: the supervisor holds no privilege; name an unprivileged user
  line 4: supervisor.allow_degraded: "memory-limt" is no control; it is one of CONTROLS
  line 8: directory[0].tier: "verifed" is no tier; it is one of internal, verified, community, untrusted, quarantined
  line 9: directory[0].grants: "api:internal-call" is no capability; it is one of api:internal-calls, api:external-api, api:system-admin, api:publish-events, api:subscribe-events
  line 11: directory[1].path: is required: the directory whose subdirectories are bundles
  line 14: plugin.Gallery: "Gallery" is not a plugin name: it must begin with a letter a-z
  line 18: plugin.gallery.lod: unknown key; did you mean "load"?
  line 19: plugin.gallery.config: ratio holds nan or inf, which JSON cannot carry to the plugin
  line 21: plugin.gallery.limits.memory_bytes: is the text "64M"; it takes a number of bytes, such as 67108864 for 64 MiB
  line 22: plugin.gallery.limits.cpu_percent: 0 is too small; the least is 1
  line 24: plugin.gallery.health.liveness_timeout_ms: must be between 1 ms and one day (86400000)
  line 26: plugins: unknown key; the tables are [supervisor], [launcher], [logs], [traces], [[directory]] and [plugin.NAME]; did you mean "plugin"?"#;
    let controls = Control::ALL.map(Control::as_str).join(", ");
    assert_eq!(problems(text), expected.replace("CONTROLS", &controls));
}

#[test]
fn what_a_key_takes_is_said_once_and_in_words() {
    for (text, expected) in [
        (
            "[launcher]\nlinger = 30\n",
            "line 2: launcher.linger: is the number 30; it takes a time in text, in whole seconds, minutes or hours, such as \
             \"30s\", \"5m\" or \"1h\"",
        ),
        (
            "[[plugin.a.network.listen]]\naddress = \"0.0.0.0:1\"\nport = \"8080\"\n",
            "line 3: plugin.a.network.listen[0].port: is the text \"8080\"; it takes a port: a number from 1024 to 65535, such \
             as 8080",
        ),
        (
            "[[directory]]\npath = 5\n",
            "line 2: directory[0].path: is the number 5; it takes a path in text, such as \"/srv/plugins\"",
        ),
        ("directory = [\"plugins\"]\n", "line 1: directory[0]: must be a table, not the text \"plugins\""),
        (
            "[traces]\nendpoint = 1\nsample = 0.5\n",
            "line 2: traces.endpoint: is the number 1; it takes an address in text, such as \"http://127.0.0.1:4317\"",
        ),
    ] {
        assert_eq!(
            problems(text),
            format!("the configuration /etc/plugvisor/plugvisor.toml has 1 problem:\n  {expected}")
        );
    }
}

/// A guess at who is trusted, at a grant or at a wall that may be missing could be taken for advice.
#[test]
fn what_decides_over_trust_is_listed_and_never_guessed() {
    for text in [
        "[[directory]]\npath = \"p\"\ntier = \"trusted\"\n",
        "[[directory]]\npath = \"p\"\ngrants = [\"database:write\"]\n",
        "[supervisor]\nallow_degraded = [\"net-namespace\"]\n",
        "[supervisor]\ndisallow_degraded = []\n",
    ] {
        let said = problems(text);
        assert!(!said.contains("did you mean"), "{said}");
    }
}

#[test]
fn what_could_be_read_of_a_wrong_file_is_there_beside_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("own.toml");
    fs::write(&file, "[[directory]]\ntier = \"internal\"\n[[directory]]\npath = \"p\"\n").unwrap();
    let (config, problems) = Config::read(Some(&file), &Surroundings::default()).unwrap();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert_eq!((config.directories[0].index, config.line("directory[1].path")), (1, Some(4)));
    assert_eq!(&*config.place(), file.to_str().unwrap());
    let said = config.without(problems).unwrap_err().to_string();
    assert!(said.contains(file.to_str().unwrap()), "{said}");
}

#[test]
fn addresses_off_the_loopback_are_refused() {
    let text = problems("[supervisor]\nmetrics_address = \"0.0.0.0:4001\"\n");
    assert!(text.contains("is not a loopback address"), "{text}");
}

#[test]
fn traces_go_to_a_plain_receiver() {
    assert_eq!(parse("").unwrap().traces, None);
    let traces = parse("[traces]\nendpoint = \"http://127.0.0.1:4317\"\nsample = 0.25").unwrap().traces.unwrap();
    assert_eq!((traces.endpoint.as_str(), traces.share), ("http://127.0.0.1:4317", 0.25));
    for wrong in ["https://a:4317", "a:4317", "", "http://", "unix:/run/x"] {
        let text = problems(&format!("[traces]\nendpoint = {wrong:?}"));
        assert!(text.contains("line 2: traces.endpoint: ") && text.contains("write http://HOST:PORT"), "{text}");
    }
    assert!(problems("[traces]\nsample = 0.5").contains("says nothing without an endpoint"));
    assert!(problems("[traces]\nendpoint = \"http://h:1\"\nsample = 1.5").contains("a share from 0 to 1"));
}

#[test]
fn a_launcher_is_ones_own_or_another_and_times_are_whole_seconds() {
    let launcher = |text: &str| parse(&format!("[launcher]\n{text}")).unwrap().launcher;
    let embedded = |seconds| LauncherConfig::Embedded { linger: Duration::from_secs(seconds) };
    assert_eq!(launcher(""), embedded(0));
    for (text, seconds) in [("0s", 0), ("30s", 30), ("5m", 300), ("24h", 86_400)] {
        assert_eq!(launcher(&format!("linger = {text:?}")), embedded(seconds));
    }
    let external = LauncherConfig::External { socket: "/etc/plugvisor/launcher.sock".into() };
    assert_eq!(launcher("socket = \"launcher.sock\""), external);
    for text in ["", "s", "30", "+3s", "1.5s", "-1s", "500ms", "25h", "99999999999999999999s", "5é"] {
        let text = problems(&format!("[launcher]\nlinger = {text:?}"));
        assert!(text.contains("line 2: launcher.linger: ") && text.contains("write whole seconds"), "{text}");
    }
    let both = problems("[launcher]\nsocket = \"/run/l.sock\"\nlinger = \"30s\"");
    assert!(both.contains("line 3: launcher.linger: is set where that launcher is started"), "{both}");
}

#[test]
fn broken_toml_is_reported_by_line() {
    let text = problems("[supervisor]\nuser = \n");
    assert!(text.contains("line 2: "), "{text}");
}

#[test]
fn the_file_may_be_absent_only_when_nobody_named_it() {
    let directory = tempfile::tempdir().unwrap();
    let surroundings =
        Surroundings { uid: 1000, xdg_config_home: Some(directory.path().to_owned()), ..Default::default() };
    let config = Config::load(None, &surroundings).unwrap();
    assert_eq!(config.file, None);
    assert_eq!(config.supervisor.runtime_directory, Path::new("/tmp/plugvisor-1000"));
    let missing = directory.path().join("missing.toml");
    let error = Config::load(Some(&missing), &surroundings).unwrap_err().to_string();
    assert!(error.contains("missing.toml") && error.contains("check the path"), "{error}");
}

#[test]
fn settings_say_where_they_were_set() {
    let text = "[supervisor]\nuser = \"daemon\"\nallow_degraded = [\n  \"cpu-limit\",\n]\n\n[logs]\nfiles = 2\n\n\
                [[directory]]\npath = \"here\"\n\n[plugin.gallery]\nload = \"manual\"\n\
                config = { apiKey = \"x\", size = 3 }\n[plugin.gallery.limits]\nmemory_bytes = 2_000_000\n";
    let mut config = parse(text).unwrap();
    config.note_flag("supervisor.runtime_directory", "--runtime-directory");
    let settings = config.settings();
    let of = |key: &str| {
        let found = settings.iter().find(|setting| setting.key == key).unwrap_or_else(|| panic!("no {key}"));
        (found.value.as_str(), found.origin.clone())
    };
    assert_eq!(of("supervisor.user"), ("\"daemon\"", Origin::Line(2)));
    assert_eq!(of("supervisor.allow_degraded"), ("[\"cpu-limit\"]", Origin::Line(3)));
    assert_eq!(of("supervisor.metrics_address"), ("\"127.0.0.1:4001\"", Origin::Default));
    assert_eq!(of("supervisor.runtime_directory").1, Origin::Flag("--runtime-directory"));
    assert_eq!(of("supervisor.parallel_starts"), ("8", Origin::Default));
    assert_eq!(of("launcher.linger"), ("\"0s\"", Origin::Default));
    assert_eq!(of("logs.files"), ("2", Origin::Line(8)));
    assert_eq!(of("logs.file_bytes"), ("4194304", Origin::Default));
    assert_eq!(of("directory[0].path"), ("\"/etc/plugvisor/here\"", Origin::Line(11)), "as it is used");
    assert_eq!(of("directory[0].tier"), ("\"untrusted\"", Origin::Default));
    assert_eq!(of("plugin.gallery.limits.memory_bytes"), ("2_000_000", Origin::Line(17)));
    assert_eq!(of("plugin.gallery.config.size"), ("3", Origin::Line(15)));
    assert_eq!(of("plugin.gallery.config.apiKey"), ("(hidden)", Origin::Line(15)));
}

#[test]
fn what_is_kept_of_logs_is_bounded() {
    let config = parse("[logs]\ndirectory = \"logs\"\nfiles = 0\nlines_per_second = 5\n").unwrap();
    assert_eq!(config.logs.directory.as_deref(), Some(Path::new("/etc/plugvisor/logs")));
    assert!(config.logs.files.files == 0 && config.logs.lines.lines_per_second == 5);
    let error = parse("[logs]\nfile_bytes = 1\nfiles = 101\nline_bytes = 5\nlins = 1\n").unwrap_err().to_string();
    for part in ["line 2: logs.file_bytes: 1 is not between", "line 3: logs.files", "line 4: logs.line_bytes", "line 5"]
    {
        assert!(error.contains(part), "no {part}: {error}");
    }
}

#[test]
fn what_a_plugin_may_reach_is_read_and_judged() {
    let config = parse(
        "[plugin.net.network]\negress = [\"*.example.com:443\"]\naddresses = [\"127.0.0.1\", \"10.1.0.0/16\"]\n\
         [plugin.net.limits]\nnetwork_bytes_per_second = 1000\n",
    )
    .unwrap();
    let plugin = config.plugin(&"net".parse().unwrap());
    assert_eq!(plugin.network.egress, Some(vec!["*.example.com:443".parse().unwrap()]));
    assert_eq!(plugin.network.addresses, ["127.0.0.1".parse().unwrap(), "10.1.0.0/16".parse().unwrap()]);
    assert_eq!(plugin.limits.network_bytes, Some(1000));
    assert_eq!(config.plugin(&"other".parse().unwrap()).network.egress, None);
    let text = problems(
        "[plugin.net.network]\negress = [\"example.com\", \"*:443\"]\naddresses = [\"10.1.2.3/16\", \"localhost\"]\n\
         adresses = []\n[plugin.net.limits]\nnetwork_bytes_per_second = 0\n",
    );
    for part in [
        "line 2: plugin.net.network.egress: \"example.com\" has no port",
        "\"*:443\" has a wildcard that means too much",
        "line 3: plugin.net.network.addresses: \"10.1.2.3/16\" has bits behind its prefix; the network is 10.1.0.0/16",
        "\"localhost\" is neither an address nor a network",
        "addresses",
        "network_bytes_per_second: 0 is too small",
    ] {
        assert!(text.contains(part), "no {part}: {text}");
    }
}

#[test]
fn where_a_plugin_is_reached_is_read_and_judged() {
    let config = parse(
        "[[plugin.web.network.listen]]\naddress = \"0.0.0.0:8443\"\nport = 8080\n\
         [[plugin.web.network.listen]]\naddress = \"[::1]:0\"\nport = 8081\nmax_connections = 5\nconnect_timeout_ms = 100\n\
         idle_timeout_ms = 1000\n[plugin.web.network]\negress = []\n",
    )
    .unwrap();
    let network = config.plugin(&"web".parse().unwrap()).network;
    assert_eq!(network.egress, Some(Vec::new()));
    let expected = [
        ListenConfig {
            address: "0.0.0.0:8443".parse().unwrap(),
            port: 8080,
            max_connections: 64,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
        },
        ListenConfig {
            address: "[::1]:0".parse().unwrap(),
            port: 8081,
            max_connections: 5,
            connect_timeout: Duration::from_millis(100),
            idle_timeout: Duration::from_secs(1),
        },
    ];
    assert_eq!(network.listen, expected);
    let shown = config.settings();
    assert!(shown.iter().any(|setting| setting.key == "plugin.web.network.listen[1].port" && setting.value == "8081"));

    let text = problems(
        "[[plugin.a.network.listen]]\naddress = \"localhost:80\"\nport = 80\nmax_connections = 0\n\
         [[plugin.a.network.listen]]\nport = 3128\nidle_timeout_ms = 0\nadress = \"0.0.0.0:1\"\n\
         [[plugin.b.network.listen]]\naddress = \"0.0.0.0:4001\"\nport = 9000\nmax_connections = 200\n\
         [[plugin.b.network.listen]]\naddress = \"0.0.0.0:9001\"\nport = 9000\n\
         [[plugin.c.network.listen]]\naddress = \"127.0.0.1:9001\"\n\
         [plugin.d.network]\nlisten = [\"0.0.0.0:5\"]\n[plugin.e.network]\nlisten = 5\n",
    );
    for part in [
        "line 2: plugin.a.network.listen[0].address: \"localhost:80\" is not an address",
        "line 3: plugin.a.network.listen[0].port: 80 is below 1024",
        "line 4: plugin.a.network.listen[0].max_connections: 0 is not between 1 and 256",
        "plugin.a.network.listen[1].address: is required",
        "plugin.a.network.listen[1].port: 3128 is the egress proxy's",
        "plugin.a.network.listen[1].idle_timeout_ms: must be between",
        "plugin.a.network.listen[1].adress: unknown key",
        "plugin.b.network.listen[0].address: 0.0.0.0:4001 cannot be had beside 127.0.0.1:4001, which supervisor.metrics_address",
        "plugin.b.network.listen: max_connections of all its addresses are 264 together",
        "plugin.c.network.listen[0].address: 127.0.0.1:9001 cannot be had beside 0.0.0.0:9001, which plugin.b.network.listen[1].address",
        "plugin.c.network.listen[0].port: is required",
        "plugin.d.network.listen[0]: must be a table, not the text",
        "plugin.e.network.listen: must be written as [[plugin.e.network.listen]]",
    ] {
        assert!(text.contains(part), "no {part}: {text}");
    }
}

#[test]
fn variables_are_written_or_passed_on() {
    let surroundings = Surroundings {
        variables: [("TZ", "Europe/Vaduz"), ("PASSED", "yes")].map(|(name, value)| (name.into(), value.into())).into(),
        ..Surroundings::default()
    };
    let parse = |text: &str| Config::parse(text, Path::new("/etc/plugvisor/plugvisor.toml"), &surroundings);
    let text = "[plugin.a]\nenv = { TITLE = \"x y\", TZ = \"UTC\" }\npass_env = [\"PASSED\", \"UNSET\"]\n";
    let plugin = parse(text).unwrap().plugin(&"a".parse().unwrap());
    let given: Vec<_> = plugin.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(given, [("PASSED", "yes"), ("TITLE", "x y"), ("TZ", "UTC")]);
    assert_eq!(plugin.unset.iter().map(VariableName::as_str).collect::<Vec<_>>(), ["UNSET"]);

    let wrong = "[plugin.a]\nenv = { LD_PRELOAD = \"x\", HTTPS_PROXY = \"x\", F = \"() { :; }\", TZ = \"x\" }\n\
                 pass_env = [\"TZ\", \"PATH\", \"A B\"]\n";
    let error = parse(wrong).unwrap_err().to_string();
    for part in [
        "line 2: plugin.a.env: \"LD_PRELOAD\": a variable that makes a loader",
        "plugin.a.env: \"HTTPS_PROXY\": the host sets the variables of proxies",
        "plugin.a.env: \"F\": a value that begins with",
        "line 3: plugin.a.pass_env: \"TZ\": it is given twice",
        "plugin.a.pass_env: \"PATH\": ",
        "plugin.a.pass_env: \"A B\": the name of a variable",
    ] {
        assert!(error.contains(part), "no {part}: {error}");
    }
    let many: Vec<String> = (0..65).map(|number| format!("V{number} = \"\"")).collect();
    let error = parse(&format!("[plugin.a]\nenv = {{ {} }}\n", many.join(", "))).unwrap_err().to_string();
    assert!(error.contains("at most 64"), "{error}");
    let long = "x".repeat(4096);
    let many: Vec<String> = (0..5).map(|number| format!("V{number} = \"{long}\"")).collect();
    let error = parse(&format!("[plugin.a]\nenv = {{ {} }}\n", many.join(", "))).unwrap_err().to_string();
    assert!(error.contains("of 16384 bytes"), "{error}");
    let config = parse("[plugin.a]\nenv = { API_TOKEN = \"x\", TZ = \"UTC\" }\n").unwrap();
    let shown = |key: &str| config.settings().into_iter().find(|setting| setting.key == key).unwrap().value;
    assert_eq!((shown("plugin.a.env.API_TOKEN"), shown("plugin.a.env.TZ")), ("(hidden)".into(), "\"UTC\"".into()));
}
