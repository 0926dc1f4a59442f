//! Fields that cost more than they seem to: large, many, or few bytes that stand for many.

use super::{
    grpc::{call, client, message},
    wire::{END_STREAM, Peer, block, headers, indexed_literal, long_headers, request},
    world::{GROWTH, World, asked},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_over_the_limit_are_refused() {
    let ok = request("/t.target/Ok");
    let large = "x".repeat(4000);
    // A field of 4 kB in the table, named by one byte each time: 64 MB of fields in 16 kB.
    let referenced = [&ok[..], &indexed_literal("bomb", &large), &[0xbe; 16_000]].concat();
    let many: Vec<(String, &str)> = (0..5000).map(|number| (format!("field-{number}"), "v")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let one = "y".repeat(1 << 20);
    let hour = "z".repeat(16 << 20);
    let bombs = [
        ("an index bomb", long_headers(1, &referenced, END_STREAM)),
        ("5000 fields", long_headers(1, &[&ok[..], &block(&many)].concat(), END_STREAM)),
        ("a field of a mebibyte", long_headers(1, &[&ok[..], &block(&[("one", &one)])].concat(), END_STREAM)),
        ("fields of 16 MiB", long_headers(1, &[&ok[..], &block(&[("all", &hour)])].concat(), END_STREAM)),
        (
            "an index bomb in trailers",
            [headers(1, &request("/t.target/Read"), 0), long_headers(1, &referenced[ok.len()..], END_STREAM)].concat(),
        ),
        (
            "trailers of a mebibyte",
            [headers(1, &request("/t.target/Read"), 0), long_headers(1, &block(&[("one", &one)]), END_STREAM)].concat(),
        ),
    ];
    let world = World::with_attacker().await;
    for (what, bomb) in &bombs {
        let mut peer = Peer::caller(&world.caller("attacker")).await;
        peer.flood(bomb, 1).await;
        let seen = peer.outcome(|seen| seen.refused(1)).await;
        assert!(seen.refused(1) && seen.goaway != Some(0), "{what}: {seen:?}");
    }
    world.unharmed(GROWTH).await;
}

/// A table that is filled again and again, as far as it was allowed: it stays one table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_filled_for_ever_stays_a_table() {
    let world = World::with_attacker().await;
    let mut peer = Peer::caller(&world.caller("attacker")).await;
    let mut last = 1;
    for number in 0..2000_u32 {
        let fields = [request("/t.target/Ok"), indexed_literal(&format!("n{number}"), &"v".repeat(3000))].concat();
        last = 2 * number + 1;
        if peer.flood(&headers(last, &fields, END_STREAM), 1).await == 0 {
            break;
        }
        // Read, so that what is measured is the table and not unread answers.
        if number % 100 == 99 {
            peer.outcome(|seen| seen.refused(last) || last > 0).await;
        }
    }
    peer.outcome(|_| true).await;
    let sender = client(&world.caller("attacker")).await;
    let answer = call(&sender, asked("/t.target/Ok"), message(b"")).await;
    assert_eq!(answer.status(), 0, "after {last}: {answer:?}");
    world.unharmed(GROWTH).await;
}
