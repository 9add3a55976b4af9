//! `Line`: the requests that wait, and whose source is admitted next. Pure; knows no model.
//!
//! # Design
//! Start-time fair queueing on two levels: between priorities by number of sources, with weights, and within a priority
//! between tenants by work, with equal shares. Each has a *tag*, what it was given so far, divided by its weight; the
//! lowest tag is served next. One that begins to wait continues from the clock of its level, so that it can neither save up work that
//! it did not ask for nor be punished for the past. Within a tenant, requests take turns with one source each.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::request::Priority;

/// Identifies a request; ascending in the order of submission.
pub(super) type RequestId = u64;

/// The name of a tenant.
pub(super) type Tenant = Option<Arc<str>>;

/// What a part of the line amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub requests: usize,
    pub sources: usize,
    /// Target rows.
    pub rows: usize,
    /// Source tokens.
    pub tokens: usize,
    /// Bytes that the sources may come to need, each alone.
    pub bytes: usize,
}

impl Load {
    /// A request with these sources.
    pub fn of(sources: &[Waiting]) -> Load {
        let mut load = Load { requests: 1, ..Load::default() };
        sources.iter().for_each(|source| load.add(source.load()));
        load
    }

    fn add(&mut self, other: Load) {
        self.requests += other.requests;
        self.sources += other.sources;
        self.rows = self.rows.saturating_add(other.rows);
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }

    fn remove(&mut self, other: Load) {
        self.requests -= other.requests;
        self.sources -= other.sources;
        self.rows = self.rows.saturating_sub(other.rows);
        self.tokens = self.tokens.saturating_sub(other.tokens);
        self.bytes = self.bytes.saturating_sub(other.bytes);
    }
}

/// A waiting source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiting {
    pub rows: usize,
    pub tokens: usize,
    pub bytes: usize,
    /// How much work it is, in tokens: those of the source and the new ones of all rows.
    pub work: u64,
}

impl Waiting {
    fn load(&self) -> Load {
        Load { requests: 0, sources: 1, rows: self.rows, tokens: self.tokens, bytes: self.bytes }
    }
}

/// A waiting request.
#[derive(Debug)]
struct Entry {
    id: RequestId,
    /// At least one.
    sources: VecDeque<Waiting>,
}

impl Entry {
    fn load(&mut self) -> Load {
        Load::of(self.sources.make_contiguous())
    }
}

/// The waiting requests of one tenant and priority.
#[derive(Debug, Default)]
struct Share {
    tag: u64,
    requests: VecDeque<Entry>,
}

/// The waiting requests of one priority.
#[derive(Debug, Default)]
struct Class {
    tag: u64,
    /// The tag from which tenants begin.
    clock: u64,
    /// Those with waiting requests, and those that are ahead of the clock.
    tenants: BTreeMap<Tenant, Share>,
}

impl Class {
    fn is_empty(&self) -> bool {
        self.tenants.values().all(|share| share.requests.is_empty())
    }

    /// The tenant whose turn it is: of equal ones, that whose request came first.
    fn next(&self) -> Option<(&Tenant, &Share)> {
        let waiting = self.tenants.iter().filter(|(_, share)| !share.requests.is_empty());
        waiting.min_by_key(|(_, share)| (share.tag, share.requests.front().map(|entry| entry.id)))
    }
}

/// The line.
#[derive(Debug, Default)]
pub(super) struct Line {
    classes: [Class; Priority::ALL.len()],
    /// The tag from which priorities begin.
    clock: u64,
    load: Load,
}

/// How much a source adds to the tag of a priority.
fn price(priority: usize) -> u64 {
    1 << (3 * priority)
}

impl Line {
    /// What waits.
    pub fn load(&self) -> Load {
        self.load
    }

    pub fn is_empty(&self) -> bool {
        self.load.requests == 0
    }

    /// Adds a request with sources.
    pub fn push(&mut self, id: RequestId, priority: Priority, tenant: Tenant, sources: Vec<Waiting>) {
        let mut entry = Entry { id, sources: sources.into() };
        if entry.sources.is_empty() {
            return;
        }
        self.load.add(entry.load());
        let (clock, at) = (self.clock, priority as usize);
        let class = &mut self.classes[at];
        if class.is_empty() {
            // The first turn has its price too, so that a higher priority comes first.
            class.tag = class.tag.max(clock + price(at));
        }
        let clock = class.clock;
        let share = class.tenants.entry(tenant).or_default();
        if share.requests.is_empty() {
            share.tag = share.tag.max(clock);
        }
        share.requests.push_back(entry);
    }

    fn next_class(&self) -> Option<usize> {
        let waiting = (0..self.classes.len()).filter(|&at| !self.classes[at].is_empty());
        waiting.min_by_key(|&at| (self.classes[at].tag, at))
    }

    /// The request whose source is next.
    pub fn first(&self) -> Option<RequestId> {
        let (_, share) = self.classes[self.next_class()?].next()?;
        share.requests.front().map(|entry| entry.id)
    }

    /// Takes the next source, that of the first request.
    pub fn take(&mut self) -> Option<RequestId> {
        let at = self.next_class()?;
        let class = &mut self.classes[at];
        let tenant = class.next()?.0.clone();
        let waiting = class.tenants.values().filter(|share| !share.requests.is_empty()).count() as u64;
        let share = class.tenants.get_mut(&tenant)?;
        let mut entry = share.requests.pop_front()?;
        let source = entry.sources.pop_front()?;
        let id = entry.id;
        let mut left = source.load();
        if entry.sources.is_empty() {
            left.requests = 1;
        } else {
            share.requests.push_back(entry);
        }
        let work = source.work.max(1);
        // Also moved on by the share of each, so that new tenants cannot pass those that wait again and again.
        class.clock = share.tag.max(class.clock.saturating_add(work / waiting));
        share.tag = share.tag.saturating_add(work);
        self.clock = class.tag.max(self.clock);
        class.tag += price(at);
        self.load.remove(left);
        self.forget(at);
        Some(id)
    }

    /// Removes a request, if it waits.
    pub fn remove(&mut self, id: RequestId) {
        for at in 0..self.classes.len() {
            for share in self.classes[at].tenants.values_mut() {
                if let Some(place) = share.requests.iter().position(|entry| entry.id == id) {
                    let left = share.requests.remove(place).map(|mut entry| entry.load()).unwrap_or_default();
                    self.load.remove(left);
                    return self.forget(at);
                }
            }
        }
    }

    /// Forgets the tenants that wait for nothing and have no debts.
    fn forget(&mut self, at: usize) {
        let class = &mut self.classes[at];
        if class.is_empty() {
            class.tenants.clear();
            class.clock = 0;
        } else {
            let clock = class.clock;
            class.tenants.retain(|_, share| !share.requests.is_empty() || share.tag > clock);
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        *self = Line::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(work: u64) -> Waiting {
        Waiting { rows: 2, tokens: 10, bytes: 100, work }
    }

    fn tenant(name: &str) -> Tenant {
        (!name.is_empty()).then(|| name.into())
    }

    /// All requests, in the order in which their sources are taken.
    fn order(line: &mut Line) -> Vec<RequestId> {
        std::iter::from_fn(|| {
            let first = line.first();
            assert_eq!(line.take(), first);
            first
        })
        .collect()
    }

    #[test]
    fn equals_are_served_in_the_order_of_arrival_with_one_source_each_in_turn() {
        let mut line = Line::default();
        for (id, sources) in [(0, 1), (1, 3), (2, 2)] {
            line.push(id, Priority::Normal, None, vec![source(5); sources]);
        }
        assert_eq!(line.load(), Load { requests: 3, sources: 6, rows: 12, tokens: 60, bytes: 600 });
        assert_eq!(order(&mut line), [0, 1, 2, 1, 2, 1]);
        assert!(line.is_empty() && line.load() == Load::default());
    }

    #[test]
    fn tenants_get_equal_shares_however_much_they_submit() {
        let mut line = Line::default();
        (0..6).for_each(|id| line.push(id, Priority::Normal, tenant("many"), vec![source(10)]));
        line.push(6, Priority::Normal, tenant("few"), vec![source(10)]);
        line.push(7, Priority::Normal, tenant("few"), vec![source(10)]);
        assert_eq!(order(&mut line), [0, 6, 1, 7, 2, 3, 4, 5]);

        // By work, not by number.
        (0..4).for_each(|id| line.push(id, Priority::Normal, tenant("long"), vec![source(40)]));
        (4..12).for_each(|id| line.push(id, Priority::Normal, tenant("short"), vec![source(10)]));
        assert_eq!(order(&mut line)[..10], [0, 4, 5, 6, 7, 1, 8, 9, 10, 11]);
    }

    #[test]
    fn one_that_comes_late_or_back_has_saved_up_nothing() {
        let mut line = Line::default();
        (0..20).for_each(|id| line.push(id, Priority::Normal, tenant("a"), vec![source(10)]));
        (0..10).for_each(|_| assert!(line.take().is_some()));
        (20..24).for_each(|id| line.push(id, Priority::Normal, tenant("b"), vec![source(10)]));
        // Not four of b in a row for the ten of a.
        let next: Vec<_> = order(&mut line).into_iter().take(6).collect();
        assert_eq!(next.iter().filter(|&&id| id >= 20).count(), 3, "{next:?}");
    }

    #[test]
    fn new_tenants_do_not_starve_one_that_waits() {
        let mut line = Line::default();
        line.push(0, Priority::Normal, tenant("old"), vec![source(100); 2]);
        let mut taken = Vec::new();
        for id in 1..60 {
            line.push(id, Priority::Normal, tenant(&id.to_string()), vec![source(10)]);
            taken.extend(line.take());
        }
        assert_eq!(taken.iter().filter(|&&id| id == 0).count(), 2, "{taken:?}");
        let left: usize = line.classes.iter().map(|class| class.tenants.len()).sum();
        assert!(left < 30, "{left} are remembered");
    }

    #[test]
    fn a_higher_priority_is_next_and_a_lower_one_does_not_starve() {
        let mut line = Line::default();
        (0..3).for_each(|id| line.push(id, Priority::Low, None, vec![source(10)]));
        (3..40).for_each(|id| line.push(id, Priority::Normal, None, vec![source(10)]));
        assert_eq!(line.take(), Some(3));
        line.push(40, Priority::High, None, vec![source(10)]);
        assert_eq!(line.first(), Some(40));
        let rest = order(&mut line);
        let at = |id| rest.iter().position(|&taken| taken == id).expect("taken");
        assert_eq!(at(40), 0);
        line.push(50, Priority::High, None, vec![source(10); 20]);
        line.push(51, Priority::Low, None, vec![source(10)]);
        assert_eq!(order(&mut line).iter().position(|&id| id == 51), Some(20), "not at once");
        assert!((2..=9).contains(&at(0)) && (10..=18).contains(&(at(1))), "{rest:?}");
        assert_eq!(rest.len(), 40);
    }

    #[test]
    fn what_is_removed_waits_no_more() {
        let mut line = Line::default();
        for id in 0..4 {
            line.push(id, Priority::ALL[id as usize % 3], tenant("a"), vec![source(10); 2]);
        }
        line.remove(1);
        line.remove(1);
        line.remove(9);
        assert_eq!((line.load().requests, line.load().sources), (3, 6));
        let left = order(&mut line);
        assert_eq!((left.len(), left.contains(&1)), (6, false));
        line.push(7, Priority::Low, None, vec![source(1)]);
        line.clear();
        assert!(line.is_empty() && line.first().is_none());
    }
}
