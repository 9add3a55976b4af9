//! Measurements of the machine: its clock, this process's memory, CPU usage, and memory read bandwidth. Memory and CPU
//! usage come from `/proc` and are available only on Linux.

use std::fs;
use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use t5gemma_runtime::{Cancellation, Error};

/// The monotonic clock in nanoseconds, comparable between processes.
#[cfg(unix)]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A monotonic clock in nanoseconds of this process.
#[cfg(not(unix))]
pub fn now_ns() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Resident memory of this process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Peak resident memory.
    pub peak: u64,
    pub resident: u64,
    pub anonymous: u64,
    /// Mapped files, mostly weights; the system can reclaim it.
    pub file_backed: u64,
}

impl Memory {
    /// The current memory, if the system reports it.
    pub fn now() -> Option<Memory> {
        Memory::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    pub fn json(self) -> Value {
        let Memory { peak, resident, anonymous, file_backed } = self;
        json!({"peak": peak, "resident": resident, "anonymous": anonymous, "file_backed": file_backed})
    }

    /// The memory in one line of a table.
    pub fn text(memory: Option<Memory>) -> String {
        let Some(Memory { peak, resident, anonymous, file_backed }) = memory else { return "not available".into() };
        let [peak, resident, anonymous, file_backed] = [peak, resident, anonymous, file_backed].map(super::megabytes);
        format!("{peak} at its peak; now {resident}, {anonymous} of it anonymous and {file_backed} of files")
    }

    fn parse(status: &str) -> Option<Memory> {
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Memory {
            peak: field("VmHWM")?,
            resident: field("VmRSS")?,
            anonymous: field("RssAnon")?,
            file_backed: field("RssFile")?,
        })
    }
}

/// CPU seconds used up to a point in time.
pub struct Processors {
    /// By all processes; time stolen by a hypervisor counts as busy.
    machine: f64,
    /// By this process.
    own: f64,
    number: usize,
    at: Instant,
}

/// CPU time is counted in ticks; up to this many seconds may look foreign just by rounding.
const ROUNDING: f64 = 0.02;

impl Processors {
    /// The current counts, if the system reports them.
    #[cfg(unix)]
    pub fn now() -> Option<Processors> {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let (machine, number) = busy_ticks(&fs::read_to_string("/proc/stat").ok()?)?;
        let own = own_ticks(&fs::read_to_string("/proc/self/stat").ok()?)?;
        Some(Processors { machine: machine as f64 / ticks, own: own as f64 / ticks, number, at: Instant::now() })
    }

    /// Not available on this system.
    #[cfg(not(unix))]
    pub fn now() -> Option<Processors> {
        None
    }

    /// The share of the machine in use since `before`, 0 to 1.
    pub fn busy_since(&self, before: &Processors) -> f64 {
        (self.machine - before.machine) / self.capacity_since(before)
    }

    /// The share of the machine that other processes used since `before`, 0 to 1.
    pub fn foreign_since(&self, before: &Processors) -> f64 {
        let foreign = (self.machine - before.machine) - (self.own - before.own) - ROUNDING;
        foreign.max(0.0) / self.capacity_since(before)
    }

    fn capacity_since(&self, before: &Processors) -> f64 {
        (self.at - before.at).as_secs_f64().max(1e-3) * self.number as f64
    }
}

/// Busy ticks in `/proc/stat` (user, nice, system, irq, softirq and steal, but not idle or iowait), and the number of
/// processors.
fn busy_ticks(stat: &str) -> Option<(u64, usize)> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().take(8).map(|field| field.parse().ok()).collect::<Option<_>>()?;
    let busy = ticks.get(..3)?.iter().sum::<u64>() + ticks.get(5..8)?.iter().sum::<u64>();
    Some((busy, stat.lines().skip(1).filter(|line| line.starts_with("cpu")).count()))
}

/// utime and stime in `/proc/self/stat`. The process name before them may contain anything, even parentheses.
fn own_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Cores that this process may use.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Size of the buffer to read, much larger than the caches.
const READ_BYTES: usize = 512 << 20;
/// Numbers to read between two looks at the clock.
const BLOCK: usize = (1 << 20) / size_of::<u64>();
const WINDOW: Duration = Duration::from_millis(50);
const WINDOWS: usize = 20;

/// Memory read bandwidth in bytes per second of `threads` threads, at most one per core: the best of several windows.
/// `None` if the buffer cannot be allocated.
///
/// # Errors
/// [`Error::Cancelled`].
pub fn read_bandwidth(threads: usize, cancel: &Cancellation) -> Result<Option<f64>, Error> {
    let threads = threads.clamp(1, cores());
    let part = READ_BYTES / size_of::<u64>() / threads;
    let mut parts: Vec<Vec<u64>> = vec![Vec::new(); threads];
    if parts.iter_mut().any(|numbers| numbers.try_reserve_exact(part).is_err()) {
        return Ok(None);
    }
    // Each thread first writes the pages it will read, so that they are NUMA-local; zero pages never written would all
    // map to one physical page.
    if on_threads(parts.iter_mut(), |numbers| numbers.resize(part, 1)).is_none() {
        return Ok(None);
    }

    let start = Instant::now();
    let counts = on_threads(parts.iter(), |numbers| {
        let mut bytes = [0; WINDOWS];
        for block in numbers.chunks(BLOCK).cycle() {
            let window = (start.elapsed().as_nanos() / WINDOW.as_nanos()) as usize;
            if window >= WINDOWS || cancel.is_cancelled() {
                break;
            }
            black_box(sum(block));
            bytes[window] += size_of_val(block);
        }
        bytes
    });
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    let best = |counts: Vec<[usize; WINDOWS]>| {
        (0..WINDOWS).map(|window| counts.iter().map(|bytes| bytes[window]).sum::<usize>()).max().unwrap_or(0)
    };
    Ok(counts.map(|counts| best(counts) as f64 / WINDOW.as_secs_f64()))
}

/// Runs `work` on each part, each on its own thread. `None` if a thread cannot be started.
fn on_threads<P: Send, T: Send>(parts: impl Iterator<Item = P>, work: impl Fn(P) -> T + Sync) -> Option<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> =
            parts.map(|part| thread::Builder::new().spawn_scoped(scope, move || work(part))).collect();
        running.into_iter().map(|thread| thread.ok()?.join().ok()).collect()
    })
}

/// The sum of all numbers, in lanes so that memory and not addition is the bottleneck.
fn sum(block: &[u64]) -> u64 {
    let (chunks, rest) = block.as_chunks::<16>();
    let mut lanes = [0u64; 16];
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*number);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, number| sum.wrapping_add(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_status_of_a_process() {
        let status = "Name:\tt5gemma\nVmPeak:\t  99 kB\nVmHWM:\t    1000 kB\nVmRSS:\t     900 kB\nRssAnon:\t     300 kB\n\
                      RssFile:\t     600 kB\nRssShmem:\t       0 kB\n";
        let memory = Memory { peak: 1_024_000, resident: 921_600, anonymous: 307_200, file_backed: 614_400 };
        assert_eq!(Memory::parse(status), Some(memory));
        for missing in ["VmHWM", "VmRSS", "RssAnon", "RssFile"] {
            assert_eq!(Memory::parse(&status.replace(missing, "Other")), None, "{missing}");
        }
        assert_eq!(Memory::parse(&status.replace("300 kB", "300 pages")), None);
    }

    #[test]
    fn processor_time_is_counted_without_idling() {
        let stat = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\ncpu1 2 2\nintr 5\n";
        assert_eq!(busy_ticks(stat), Some((100 + 20 + 30 + 6 + 7 + 8, 2)));
        let own = "42 (a (b) c) R 1 2 3 4 5 6 7 8 9 10 250 50 0 0";
        assert_eq!(own_ticks(own), Some(300));
        for broken in ["", "cpu  1 2 3", "cpu  1 2 3 4 5 6 x 8", "intr 5"] {
            assert_eq!(busy_ticks(broken), None, "{broken}");
            assert_eq!(own_ticks(broken), None, "{broken}");
        }
    }

    #[test]
    fn shares_of_the_machine_are_of_all_its_cores() {
        let at = Instant::now();
        let before = Processors { machine: 100.0, own: 10.0, number: 2, at };
        let after = |machine, own| Processors { machine, own, number: 2, at: at + Duration::from_secs(4) };
        assert_eq!(after(102.0, 11.0).busy_since(&before), 0.25);
        assert!((after(102.0, 11.0).foreign_since(&before) - (1.0 - ROUNDING) / 8.0).abs() < 1e-12);
        assert_eq!(after(101.0, 11.0).foreign_since(&before), 0.0);
    }

    #[test]
    fn every_number_is_summed_once() {
        for length in [0, 1, 15, 16, 17, 1000] {
            let numbers: Vec<u64> = (0..length).collect();
            assert_eq!(sum(&numbers), numbers.iter().sum::<u64>(), "{length}");
        }
    }
}
