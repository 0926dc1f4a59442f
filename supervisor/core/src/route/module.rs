//! The services of the host that plugins may call, and what each takes.
//!
//! One service for each capability, so that the router, which knows services and not methods, decides alone. Those whose
//! module is not written yet are here too: who may not call them is told so today, in the words that will hold then.

use plugvisor_package::Capability;

use crate::Rights;

macro_rules! modules {
    ($($(#[$doc:meta])* $variant:ident = $service:literal, [$($capability:ident),+], $served:literal;)+) => {
        /// A service that the supervisor itself offers to plugins.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum HostModule {
            $($(#[$doc])* $variant),+
        }

        impl HostModule {
            /// Every module.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The fully qualified name of its service.
            #[must_use]
            pub const fn service(self) -> &'static str {
                match self { $(Self::$variant => $service),+ }
            }

            /// What a plugin must hold to call it: any of these. The first is the least.
            #[must_use]
            pub const fn capabilities(self) -> &'static [Capability] {
                match self { $(Self::$variant => &[$(Capability::$capability),+]),+ }
            }

            /// Whether this version serves it.
            #[must_use]
            pub const fn is_served(self) -> bool {
                match self { $(Self::$variant => $served),+ }
            }
        }
    };
}

modules! {
    /// Reads of the host's database.
    DatabaseReader = "plugvisor.host.v1.DatabaseReader", [DatabaseReadOnly, DatabaseReadWrite, DatabaseAdmin], false;
    /// Writes to the host's database.
    DatabaseWriter = "plugvisor.host.v1.DatabaseWriter", [DatabaseReadWrite, DatabaseAdmin], false;
    /// Schema and maintenance of the host's database.
    DatabaseAdmin = "plugvisor.host.v1.DatabaseAdmin", [DatabaseAdmin], false;
    /// Requests to services outside the host, made by the host.
    ExternalApi = "plugvisor.host.v1.ExternalApi", [ExternalApi], false;
    /// The admin service, as operators have it on `admin.sock`.
    Admin = "plugvisor.admin.v1.Admin", [SystemAdmin], false;
    /// Publishing events.
    Events = "plugvisor.host.v1.Events", [PublishEvents], true;
    /// Receiving events.
    Subscriptions = "plugvisor.host.v1.Subscriptions", [SubscribeEvents], false;
    /// Keys that never leave the host, and what is done with them.
    Crypto = "plugvisor.host.v1.Crypto", [CryptoOperations], false;
    /// Who a user is.
    Users = "plugvisor.host.v1.Users", [UserAuth], false;
    /// Tokens, issued and checked.
    Tokens = "plugvisor.host.v1.Tokens", [TokenManagement], false;
    /// Secrets, handed out by grant.
    Secrets = "plugvisor.host.v1.Secrets", [ReadSecrets], false;
}

impl HostModule {
    /// The module of this service.
    #[must_use]
    pub fn of(service: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|module| module.service() == service)
    }

    /// The least that a plugin must hold to call it.
    #[must_use]
    pub const fn capability(self) -> Capability {
        self.capabilities()[0]
    }

    /// What of a plugin's rights opens it; `None` when nothing does.
    #[must_use]
    pub fn held_by(self, rights: &Rights) -> Option<Capability> {
        self.capabilities().iter().copied().find(|capability| rights.hold(*capability))
    }

    /// The service that a capability is for, of those that are for one of the host's; `None` for the others.
    #[must_use]
    pub fn for_capability(capability: Capability) -> Option<Self> {
        Self::ALL.iter().copied().find(|module| module.capability() == capability)
    }
}
