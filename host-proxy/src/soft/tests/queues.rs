//! Submissions: order, failure, limits.

use super::*;

#[test]
fn a_hang_ends_in_a_reset_and_the_next_submission_runs() {
    let driver = driver();
    let client = Client::new(&driver);
    let buffer = client.create(PAGE);
    let hung = client.submit(&hang(), &[]).unwrap();
    let next = stream(|stream| stream.push(0, &store(0, 8, 7)).unwrap());
    let next = client.submit(&next, &[buffer]).unwrap();
    assert_eq!(client.wait(next), 0);
    assert_eq!(client.wait(hung), -Errno::EIO.number());
    assert_eq!(client.map(buffer).bytes()[8..12], 7_u32.to_le_bytes());
    let stats = client.stats();
    assert_eq!((stats.resets, stats.hangs, stats.faults), (1, 1, 0));
    assert_eq!(stats.banned, 0);
}
