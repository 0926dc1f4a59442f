//! Environment variables that an operator gives to a plugin: what their names and values may be.
//!
//! A variable can be code: the dynamic loader, shells and most languages' runtimes take programs, libraries and options
//! from their environment. Such names are refused, whoever asks, and so are those that the host sets itself. The list
//! cannot be whole, as every program may read variables of its own; so whoever launches also holds a list of the names
//! that one plugin may be given.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The name of a variable that an operator may give to a plugin.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VariableName(String);

/// Why a text is not such a name, or not such a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VariableError {
    /// The grammar of names.
    #[error("the name of a variable has letters, digits and _ only, and no digit first")]
    Grammar,
    /// A name is too long.
    #[error("the name of a variable has at most {} bytes", VariableName::MAX_LEN)]
    NameTooLong,
    /// `PLUGVISOR_*`, `LISTEN_*`.
    #[error("the host sets this variable itself")]
    OfHost,
    /// `*_proxy` in either case.
    #[error("the host sets the variables of proxies itself, with a network capability")]
    OfProxy,
    /// What a loader, a shell or a runtime takes code from.
    #[error("a variable that makes a loader, a shell or a language's runtime run other code is given to no plugin")]
    Code,
    /// A value is too long.
    #[error("a value has at most {} bytes", VariableName::MAX_VALUE)]
    ValueTooLong,
    /// The environment ends a value with one.
    #[error("a value holds no NUL")]
    Nul,
    /// What bash takes for a function, whatever the name.
    #[error("a value that begins with \"()\" is a function to a shell, and is given to no plugin")]
    Function,
}

/// Beginnings of names that are code to somebody. glibc's own list of what a set-uid program ignores
/// (`sysdeps/generic/unsecvars.h`), sudo's (`env.c`), and what the runtimes of common languages document.
const CODE_PREFIXES: &[&str] = &[
    "LD_",
    "_RLD",
    "DYLD_",
    "BASH_FUNC_",
    "GLIBC_",
    "GCONV_",
    "GETCONF_",
    "LUA_",
    "DOTNET_STARTUP",
    "CORECLR_",
    "COR_",
    "GEM_",
    "BUNDLE_",
    "ERL_",
    "ELIXIR_ERL_",
    "GUILE_",
    "JULIA_",
];

/// Whole names, of the same sources.
const CODE: &[&str] = &[
    "PATH",
    "IFS",
    "ENV",
    "BASH_ENV",
    "BASHOPTS",
    "SHELLOPTS",
    "CDPATH",
    "GLOBIGNORE",
    "PS4",
    "PROMPT_COMMAND",
    "FPATH",
    "ZDOTDIR",
    "NULLCMD",
    "READNULLCMD",
    "TMPPREFIX",
    "SHELL",
    "EDITOR",
    "VISUAL",
    "PAGER",
    "BROWSER",
    "LESSOPEN",
    "LESSCLOSE",
    "NLSPATH",
    "LOCPATH",
    "MALLOC_TRACE",
    "TZDIR",
    "PATH_LOCALE",
    "HOSTALIASES",
    "LOCALDOMAIN",
    "RES_OPTIONS",
    "RESOLV_HOST_CONF",
    "NIS_PATH",
    "TERMCAP",
    "TERMINFO",
    "TERMINFO_DIRS",
    "TERMPATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONINSPECT",
    "PYTHONUSERBASE",
    "PYTHONEXECUTABLE",
    "PYTHONBREAKPOINT",
    "PYTHONWARNINGS",
    "PERL5LIB",
    "PERL5OPT",
    "PERL5DB",
    "PERLLIB",
    "PERLIO_DEBUG",
    "RUBYLIB",
    "RUBYOPT",
    "NODE_OPTIONS",
    "NODE_PATH",
    "JAVA_TOOL_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "_JAVA_OPTIONS",
    "CLASSPATH",
    "R_PROFILE",
    "R_ENVIRON",
    "GTK_MODULES",
    "GTK_PATH",
    "GIO_EXTRA_MODULES",
    "QT_PLUGIN_PATH",
    "PHPRC",
    "PHP_INI_SCAN_DIR",
    "OPENSSL_CONF",
    "OPENSSL_MODULES",
];

impl VariableName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 128;

    /// The longest value, in bytes.
    pub const MAX_VALUE: usize = 4096;

    /// The most variables that one plugin is given.
    pub const MAX_COUNT: usize = 64;

    /// The most bytes that they may take: names, values, and two for each.
    pub const MAX_TOTAL: usize = 16 << 10;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a variable may have this value.
    ///
    /// # Errors
    ///
    /// Why it may not.
    pub fn check_value(value: &str) -> Result<(), VariableError> {
        if value.len() > Self::MAX_VALUE {
            Err(VariableError::ValueTooLong)
        } else if value.contains('\0') {
            Err(VariableError::Nul)
        } else if value.starts_with("()") {
            Err(VariableError::Function)
        } else {
            Ok(())
        }
    }
}

impl FromStr for VariableName {
    type Err = VariableError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > Self::MAX_LEN {
            return Err(VariableError::NameTooLong);
        }
        let head = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        if !head || !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err(VariableError::Grammar);
        }
        if ["PLUGVISOR_", "LISTEN_"].iter().any(|prefix| text.starts_with(prefix)) {
            return Err(VariableError::OfHost);
        }
        if text.len() >= 6 && text[text.len() - 6..].eq_ignore_ascii_case("_proxy") {
            return Err(VariableError::OfProxy);
        }
        if CODE.contains(&text) || CODE_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            return Err(VariableError::Code);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for VariableName {
    type Error = VariableError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VariableName> for String {
    fn from(name: VariableName) -> Self {
        name.0
    }
}

impl fmt::Display for VariableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::{VariableError, VariableName};

    #[test]
    fn names_that_are_the_hosts_or_code_are_nobodys() {
        for good in ["TZ", "LANG", "LC_ALL", "GALLERY_TITLE", "_x", "a1", "RUST_LOG", "PYTHONUNBUFFERED", "proxy"] {
            assert_eq!(good.parse::<VariableName>().unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", VariableError::Grammar),
            ("1A", VariableError::Grammar),
            ("A B", VariableError::Grammar),
            ("A=B", VariableError::Grammar),
            ("Ä", VariableError::Grammar),
            ("PLUGVISOR_BROKER", VariableError::OfHost),
            ("LISTEN_FDS", VariableError::OfHost),
            ("HTTPS_PROXY", VariableError::OfProxy),
            ("no_proxy", VariableError::OfProxy),
            ("All_Proxy", VariableError::OfProxy),
            ("LD_PRELOAD", VariableError::Code),
            ("GLIBC_TUNABLES", VariableError::Code),
            ("GCONV_PATH", VariableError::Code),
            ("PYTHONPATH", VariableError::Code),
            ("PATH", VariableError::Code),
            (&"A".repeat(129), VariableError::NameTooLong),
        ] {
            assert_eq!(bad.parse::<VariableName>(), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn values_are_bounded_and_no_functions() {
        assert_eq!(VariableName::check_value(&"x".repeat(4096)), Ok(()));
        assert_eq!(VariableName::check_value(&"x".repeat(4097)), Err(VariableError::ValueTooLong));
        assert_eq!(VariableName::check_value("a\0b"), Err(VariableError::Nul));
        assert_eq!(VariableName::check_value("() { :; }; echo"), Err(VariableError::Function));
    }
}
