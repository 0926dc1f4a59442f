//! What a Launch may say: every field of the request, and what its bundle's manifest says is executed, against the
//! launcher's rules. Pure. What its bundle may be is in `store` and `policy`.

use std::{
    ffi::CString,
    path::{Component, Path},
};

use plugvisor_package::{PluginName, VariableName};
use plugvisor_sandbox::protocol::{
    Control, EGRESS, Grant, Launch, Limits, MAX_INWARD, Refusal, RefusalCode, SocketMode,
};

use crate::{
    directories::Kind,
    level::{self, Keeper, Tree, Walls},
    mounts,
    store::Stated,
};

const MAX_ARGS: usize = 256;
const MAX_VARIABLES: usize = 256;
const MAX_ENTRY_PATH: usize = 1024;
/// Below this a program cannot start at all.
const MIN_MEMORY: u64 = 1 << 20;

/// What is executed, and how: what the bundle's manifest says, as the kernel takes it.
pub(crate) struct Checked {
    pub(crate) plugin: PluginName,
    pub(crate) walls: Walls,
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    pub(crate) socket: SocketMode,
    /// Where it listens in its own network namespace.
    pub(crate) listen: Vec<u16>,
}

pub(crate) fn refuse<T>(code: RefusalCode, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { code, message: message.into() })
}

fn policy<T>(message: impl Into<String>) -> Result<T, Refusal> {
    refuse(RefusalCode::Policy, message)
}

/// Checks a request, and gives the plugin's name and its walls. `without` are those that the escape suite leaves out.
pub(crate) fn launch(request: &Launch, without: &[Control]) -> Result<(PluginName, Walls), Refusal> {
    let Ok(plugin) = request.plugin.parse::<PluginName>() else {
        return policy(format!("{:?} is not a plugin's name", request.plugin.chars().take(64).collect::<String>()));
    };
    let walls = level::walls(request.level);
    if walls.tree == Tree::Host && request.grants.contains(&Grant::Egress) {
        // In the host's own network the proxy would be a port of the host, and nobody would have to use it.
        return policy(format!(
            "{plugin} was not started: at the level {} it has the host's network, which no proxy holds; grant it no \
             network capability, or run it at the level process",
            request.level.as_str()
        ));
    }
    inward(&plugin, request, &walls)?;
    let walls = walls.leaving_out(without);
    limits(&plugin, request)?;
    environment(&plugin, request)?;
    Ok((plugin, walls))
}

/// Whether it may be connected to, and by so many sockets.
fn inward(plugin: &PluginName, request: &Launch, walls: &Walls) -> Result<(), Refusal> {
    let granted = request.grants.contains(&Grant::TcpServer);
    let level = request.level.as_str();
    if walls.tree == Tree::Host && granted {
        // In the host's own network it would listen to everybody, at any port.
        return policy(format!(
            "{plugin} was not started: at the level {level} it has the host's network, where nothing holds who listens to \
             whom; take network:tcp-server back, or run it at the level process"
        ));
    }
    match request.inward {
        0 => Ok(()),
        _ if !granted => policy(format!(
            "{plugin} was not started: sockets that connect to it come with network:tcp-server alone; grant it, or remove \
             network.listen"
        )),
        1..=MAX_INWARD => Ok(()),
        more => policy(format!(
            "{plugin} was not started: {more} connections to it at once are too many; at most {MAX_INWARD} can be had"
        )),
    }
}

/// What a launch says beside what its manifest does.
pub(crate) struct Asked<'a> {
    pub(crate) generation: u64,
    pub(crate) grants: &'a [Grant],
    /// The operator's variables.
    pub(crate) environment: &'a [(String, String)],
}

impl<'a> Asked<'a> {
    pub(crate) fn of(request: &'a Launch) -> Self {
        Self { generation: request.generation, grants: &request.grants, environment: &request.environment }
    }
}

/// The operator's variables by themselves; which names this plugin may be given is the policy's to say.
fn environment(plugin: &PluginName, request: &Launch) -> Result<(), Refusal> {
    let variables = &request.environment;
    if variables.is_empty() {
        return Ok(());
    }
    let wrong = |why: String| policy(format!("{plugin} was not started: {why}"));
    if !request.grants.contains(&Grant::AccessEnv) {
        return wrong("variables of the operator come with process:access-env alone; grant it, or set none".to_owned());
    }
    let bytes: usize = variables.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if variables.len() > VariableName::MAX_COUNT || bytes > VariableName::MAX_TOTAL {
        return wrong(format!(
            "the operator's variables are {} of {bytes} bytes; at most {} of {} bytes may be set",
            variables.len(),
            VariableName::MAX_COUNT,
            VariableName::MAX_TOTAL
        ));
    }
    if variables.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
        return wrong("the operator's variables are not in the order of their names, each once".to_owned());
    }
    for (name, value) in variables {
        let judged = name.parse::<VariableName>().map(drop).and_then(|()| VariableName::check_value(value));
        if let Err(why) = judged {
            let name: String = name.chars().take(64).collect();
            return wrong(format!("the operator's variable {name:?} is refused: {why}"));
        }
    }
    Ok(())
}

/// Checks what a manifest says is executed. Asked when it is imported, with all that it asks for, so that a launch finds
/// nothing wrong.
pub(crate) fn program(
    plugin: &PluginName,
    asked: &Asked<'_>,
    stated: &Stated,
    walls: Walls,
) -> Result<Checked, Refusal> {
    let (argv, envp) = (argv(plugin, stated)?, envp(plugin, asked, stated, &walls)?);
    // Without the grant nothing in the kernel goes by them.
    let listen = if asked.grants.contains(&Grant::TcpServer) { stated.listen.clone() } else { Vec::new() };
    Ok(Checked { plugin: plugin.clone(), walls, argv, envp, socket: stated.socket, listen })
}

fn limits(plugin: &PluginName, request: &Launch) -> Result<(), Refusal> {
    match bounds(&request.limits) {
        Some(why) => policy(format!("{plugin} was not started: {why}")),
        None => Ok(()),
    }
}

/// What is wrong with a limit, if something is.
pub(crate) fn bounds(limits: &Limits) -> Option<&'static str> {
    if limits.memory_bytes.is_some_and(|bytes| !(MIN_MEMORY..=1 << 50).contains(&bytes)) {
        return Some("maxMemory must be between 1 MiB and 1 PiB");
    }
    if limits.cpu_percent.is_some_and(|percent| !(1..=100_000).contains(&percent)) {
        return Some("maxCPU must be between 1 and 100000 percent");
    }
    if limits.pids.is_some_and(|pids| !(1..=1 << 22).contains(&pids)) {
        return Some("its process limit must be between 1 and 4194304");
    }
    if limits.open_files.is_some_and(|files| !(8..=1 << 20).contains(&files)) {
        return Some("its limit on open files must be between 8 and 1048576");
    }
    None
}

fn argv(plugin: &PluginName, stated: &Stated) -> Result<Vec<CString>, Refusal> {
    let entry = Path::new(&stated.exec);
    let plain = entry.components().all(|part| matches!(part, Component::Normal(_)));
    if stated.exec.is_empty() || stated.exec.len() > MAX_ENTRY_PATH || !plain {
        return policy(format!("{plugin} may not run: its entry must be a relative path inside the bundle"));
    }
    if stated.args.len() > MAX_ARGS {
        return policy(format!("{plugin} may not run: it has more than {MAX_ARGS} arguments"));
    }
    let first = format!("{}/{}", mounts::BUNDLE, stated.exec);
    let all = std::iter::once(first).chain(stated.args.iter().cloned()).map(CString::new);
    let Ok(argv) = all.collect::<Result<_, _>>() else {
        return policy(format!("{plugin} may not run: its path or an argument holds a NUL byte"));
    };
    Ok(argv)
}

fn envp(plugin: &PluginName, asked: &Asked<'_>, stated: &Stated, walls: &Walls) -> Result<Vec<CString>, Refusal> {
    let Asked { generation, grants, environment } = asked;
    if stated.env.len() > MAX_VARIABLES {
        return policy(format!("{plugin} may not run: it has more than {MAX_VARIABLES} variables"));
    }
    let broker = mounts::broker(walls.tree);
    let generation = generation.to_string();
    let listen = mounts::worker(walls.tree, stated.socket);
    let mut all: Vec<(&str, &str)> = vec![
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("LANG", "C.UTF-8"),
        ("PLUGVISOR_PROTOCOL", "1"),
        ("PLUGVISOR_LISTEN", &listen),
        ("PLUGVISOR_BROKER", &broker),
        ("PLUGVISOR_PLUGIN", plugin.as_str()),
        ("PLUGVISOR_GENERATION", &generation),
    ];
    if stated.socket == SocketMode::Inherit {
        all.push(("LISTEN_FDS", "1"));
        // sd_listen_fds(3) compares LISTEN_PID with its own pid: in a fresh PID namespace the init is 1, the program 2. In
        // the host's it is not known yet; the child adds it.
        if walls.keeper == Keeper::Init {
            all.push(("LISTEN_PID", "2"));
        }
    }
    let proxy = format!("http://{EGRESS}");
    if grants.contains(&Grant::Egress) {
        // Programs read one or the other. Nothing is to be reached without the proxy, so that no name is left out.
        all.extend(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"].map(|name| (name, proxy.as_str())));
        all.extend([("NO_PROXY", ""), ("no_proxy", "")]);
    }
    for kind in Kind::BOTH {
        if kind.access(grants).is_some() {
            all.push((kind.variable(), kind.place()));
        }
    }
    for (name, value) in &stated.env {
        let reserved = ["PLUGVISOR_", "LISTEN_", "LD_", "GLIBC_TUNABLES"].iter().any(|prefix| name.starts_with(prefix));
        let grammar = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
        if reserved || !grammar {
            let name: String = name.chars().take(64).collect();
            return policy(format!(
                "{plugin} may not run: it may not set the variable {name:?} (PLUGVISOR_*, LISTEN_*, LD_* and \
                 GLIBC_TUNABLES are not its own); remove it from runtime.env"
            ));
        }
        all.retain(|(other, _)| other != name);
        all.push((name, value));
    }
    // Last, so that the operator's word counts more than the author's.
    for (name, value) in *environment {
        all.retain(|(other, _)| other != name);
        all.push((name, value));
    }
    let all = all.into_iter().map(|(name, value)| CString::new(format!("{name}={value}")));
    let Ok(envp) = all.collect::<Result<_, _>>() else {
        return policy(format!("{plugin} may not run: a variable holds a NUL byte"));
    };
    Ok(envp)
}
