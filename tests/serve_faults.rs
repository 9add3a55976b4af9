//! `t5gemma serve` under load, and with clients that break rules, are slow, leave or have no time.
//! `scripts/serve_load.py` is those clients.

use crate::common::{demo, python};
use crate::serve::{Serving, path};

fn check(serving: &Serving, what: &str, more: &[&str]) {
    let address = format!("127.0.0.1:{}", serving.port);
    assert_eq!(python("serve_load.py", [&[what, &address], more].concat()), format!("{what}\n"));
}

#[test]
fn malformed_requests_are_refused() {
    check(&Serving::start(&[path(&demo())]), "malformed", &[]);
}

#[test]
fn slow_clients_hold_nothing_for_long() {
    let limits = ["--header-timeout", "1", "--read-timeout", "1"];
    check(&Serving::start(&[&[path(&demo())], &limits[..]].concat()), "slow", &[]);
}

#[test]
fn a_fifth_of_the_clients_leaves() {
    check(&Serving::start(&[path(&demo())]), "leaving", &[]);
}

#[test]
fn deadlines_come_by_the_hundred() {
    check(&Serving::start(&[path(&demo())]), "deadlines", &[]);
}

#[test]
fn what_was_accepted_under_load_is_answered_before_the_end() {
    let mut serving = Serving::start(&[path(&demo())]);
    let pid = serving.pid().to_string();
    check(&serving, "ending", &[&pid]);
    assert!(serving.ended().success());
}

#[test]
fn memory_is_flat_under_mixed_load() {
    let serving = Serving::start(&[path(&demo())]);
    let pid = serving.pid().to_string();
    check(&serving, "soak", &[&pid, "20"]);
}
