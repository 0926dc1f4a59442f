//! Heads of requests to the egress proxy: each is understood in one way, waited for, or refused, and what is understood has
//! one destination that reads again as itself.

use plugvisor_daemon::egress::{Understood, understand};

pub(super) fn check(input: &[u8]) -> String {
    let understood = match understand(input) {
        Err(why) => {
            assert!(!why.is_empty() && !why.contains('\n'), "refused in no words, or many lines: {why:?}");
            // More bytes never make a refused head a good one.
            let longer = [input, b"\r\n\r\n"].concat();
            assert!(understand(&longer).is_err(), "{why}, but not with more");
            return why;
        }
        Ok(None) => return "waits".to_owned(),
        Ok(Some(understood)) => understood,
    };
    let Understood { head, method, host, port, framing } = &understood;
    let text = &input[..*head];
    let first = text.windows(4).position(|four| four == b"\r\n\r\n").expect("a head ends in an empty line");
    assert_eq!(first + 4, *head, "it ends where every reader ends it");
    let bare = text.iter().enumerate().any(|(at, byte)| *byte == b'\n' && (at == 0 || text[at - 1] != b'\r'));
    assert!(!bare, "a line that ends in LF alone");
    assert!(*port > 0 && !method.is_empty());
    assert_eq!(host.to_string().parse().as_ref(), Ok(host), "the host reads as another");
    // What comes behind a head changes nothing about it.
    assert_eq!(understand(text), Ok(Some(understood.clone())), "what follows it changed it");
    let named = |name: &str| {
        let mut lines = text.split(|byte| *byte == b'\n');
        let named = |line: &[u8]| {
            line.len() > name.len() && line[..=name.len()].eq_ignore_ascii_case(format!("{name}:").as_bytes())
        };
        lines.any(named)
    };
    assert!(!(named("content-length") && named("transfer-encoding")), "two framings");
    format!("{framing:?} {}", if method == "CONNECT" { "tunnel" } else { "plain" })
}
