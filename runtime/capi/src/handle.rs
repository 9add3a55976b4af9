//! Handles: an id for each object that a caller holds, never reused. A table maps ids to live objects; freeing removes
//! the entry, and the object is dropped when the last call with it has ended.

use std::any::Any;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::error::{t5g_code, t5g_error};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("handles are 64 bits wide");

/// An object behind a handle, with the name of its type in the header.
pub trait Object: Send + Sync + 'static {
    const NAME: &'static str;
}

/// A handle as C passes it.
#[repr(transparent)]
pub struct Handle<O>(*const Opaque, PhantomData<O>);

#[repr(C)]
struct Opaque([u8; 0]);

impl<O> Clone for Handle<O> {
    fn clone(&self) -> Handle<O> {
        *self
    }
}

impl<O> Copy for Handle<O> {}

#[derive(Clone)]
struct Entry {
    object: Arc<dyn Any + Send + Sync>,
    name: &'static str,
    state: Arc<State>,
}

/// What calls with an object have left behind.
#[derive(Default)]
struct State {
    /// Calls in progress.
    calls: AtomicUsize,
    /// Whether the object took part in a call that panicked.
    is_broken: AtomicBool,
    /// Whether this process was forked during a call with the object, so that its locks may stay locked for ever.
    is_lost: AtomicBool,
}

type Table = BTreeMap<usize, Entry>;

static TABLE: RwLock<Table> = RwLock::new(Table::new());
static NEXT: AtomicUsize = AtomicUsize::new(1);
/// Above every address that a process can have, so that dereferencing a handle faults. The step keeps handles aligned.
const BASE: usize = 0x0035_0000_0000_0000;
const STEP: usize = 16;

/// An object for the duration of a call. If the call panics, the object refuses further calls.
pub struct Held<O> {
    object: Arc<O>,
    state: Arc<State>,
}

impl<O> Deref for Held<O> {
    type Target = O;

    fn deref(&self) -> &O {
        &self.object
    }
}

impl<O> Held<O> {
    /// The object, to keep after the call.
    pub fn share(&self) -> Arc<O> {
        self.object.clone()
    }
}

impl<O> Drop for Held<O> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.state.is_broken.store(true, Ordering::SeqCst);
        }
        self.state.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<O: Object> Handle<O> {
    /// No object.
    pub const NULL: Handle<O> = Handle(ptr::null(), PhantomData);

    /// Adds an object to the table.
    pub fn new(object: O) -> Handle<O> {
        #[cfg(unix)]
        fork::register();
        let id = BASE + STEP * NEXT.fetch_add(1, Ordering::Relaxed);
        let entry = Entry { object: Arc::new(object), name: O::NAME, state: Arc::default() };
        TABLE.write().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        Handle(ptr::without_provenance(id), PhantomData)
    }

    /// The object of a required handle; `argument` is its name in the header.
    pub fn get(self, argument: &str) -> Result<Held<O>, t5g_error> {
        match self.find(argument)? {
            Some(held) => Ok(held),
            None => Err(t5g_error::argument(argument, format!("a {}", O::NAME), "NULL")),
        }
    }

    /// The object of an optional handle.
    pub fn find(self, argument: &str) -> Result<Option<Held<O>>, t5g_error> {
        if self.0.is_null() {
            return Ok(None);
        }
        let entry = TABLE.read().unwrap_or_else(PoisonError::into_inner).get(&self.0.addr()).map(|entry| {
            // Forks wait for the table, so a call either is counted or has not used the object yet.
            entry.state.calls.fetch_add(1, Ordering::SeqCst);
            entry.clone()
        });
        let Some(Entry { object, name, state }) = entry else { return Err(self.unknown(argument)) };
        let object = match object.downcast::<O>() {
            Ok(object) => object,
            Err(_) => {
                state.calls.fetch_sub(1, Ordering::SeqCst);
                return Err(self.of_another_kind(argument, name));
            }
        };
        let held = Held { object, state };
        if held.state.is_lost.load(Ordering::SeqCst) {
            let message = format!("{argument}: this {name} was in a call when this process was forked; make another");
            return Err(t5g_error::new(t5g_code::Closed, message).at(argument));
        }
        if held.state.is_broken.load(Ordering::SeqCst) {
            let message = format!("{argument}: this {name} was left in an unknown state by a bug; free it");
            return Err(t5g_error::new(t5g_code::Internal, message).at(argument));
        }
        Ok(Some(held))
    }

    /// Removes the object from the table; NULL is ignored.
    pub fn free(self, argument: &str) -> Result<(), t5g_error> {
        if self.0.is_null() {
            return Ok(());
        }
        let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
        match table.get(&self.0.addr()) {
            None => Err(self.unknown(argument)),
            Some(entry) if !entry.object.is::<O>() => Err(self.of_another_kind(argument, entry.name)),
            Some(_) => {
                let entry = table.remove(&self.0.addr());
                // Dropping the object may take long, and others wait for the table.
                drop(table);
                if entry.as_ref().is_some_and(|entry| entry.state.is_lost.load(Ordering::SeqCst)) {
                    // Dropping it might wait for a lock.
                    std::mem::forget(entry);
                }
                Ok(())
            }
        }
    }

    fn unknown(self, argument: &str) -> t5g_error {
        let was_given = self.0.addr() > BASE && self.0.addr() < BASE + STEP * NEXT.load(Ordering::Relaxed);
        let found = if was_given { "a handle that was freed" } else { "a value that is not a handle" };
        t5g_error::handle(argument, O::NAME, found)
    }

    fn of_another_kind(self, argument: &str, name: &str) -> t5g_error {
        t5g_error::handle(argument, O::NAME, format!("a {name}"))
    }
}

/// Forks wait until no other thread holds the lock of the table, which would stay locked in the child. The child marks
/// the objects that were in calls.
#[cfg(unix)]
mod fork {
    use std::cell::RefCell;
    use std::sync::atomic::Ordering;
    use std::sync::{Once, PoisonError, RwLockWriteGuard};

    use super::{TABLE, Table};

    thread_local! {
        /// The lock of a thread that is about to fork.
        static HELD: RefCell<Option<RwLockWriteGuard<'static, Table>>> = const { RefCell::new(None) };
    }

    extern "C" fn before() {
        let table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
        // An exiting thread cannot store the guard, and drops it.
        let _ = HELD.try_with(|held| held.replace(Some(table)));
    }

    extern "C" fn in_parent() {
        let _ = HELD.try_with(|held| held.replace(None));
    }

    extern "C" fn in_child() {
        t5gemma_runtime::fork::in_child();
        let _ = HELD.try_with(|held| {
            let table = held.replace(None);
            for entry in table.iter().flat_map(|table| table.values()) {
                if entry.state.calls.load(Ordering::SeqCst) > 0 {
                    entry.state.is_lost.store(true, Ordering::SeqCst);
                }
            }
        });
    }

    pub fn register() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            // SAFETY: the functions exist as long as the process, because the library is never unloaded. If registering
            // fails for lack of memory, forks are as without it.
            unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
        });
    }
}

/// The number of live objects.
pub fn live() -> usize {
    TABLE.read().unwrap_or_else(PoisonError::into_inner).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Cup(u32);
    struct Plate;

    impl Object for Cup {
        const NAME: &'static str = "t5g_cup";
    }

    impl Object for Plate {
        const NAME: &'static str = "t5g_plate";
    }

    fn message<T>(result: Result<T, t5g_error>) -> String {
        result.err().expect("an error").text().to_string()
    }

    #[test]
    fn what_is_no_live_handle_of_the_kind_is_told() {
        let cup = Handle::new(Cup(7));
        assert_eq!(cup.get("cup").ok().map(|cup| cup.0), Some(7));
        let plate: Handle<Plate> = Handle(cup.0, PhantomData);
        assert_eq!(message(plate.get("plate")), "plate: expected a live t5g_plate, found a t5g_cup");
        assert_eq!(message(plate.free("plate")), "plate: expected a live t5g_plate, found a t5g_cup");
        assert!(cup.free("cup").is_ok());
        assert_eq!(message(cup.get("cup")), "cup: expected a live t5g_cup, found a handle that was freed");
        assert_eq!(message(cup.free("cup")), "cup: expected a live t5g_cup, found a handle that was freed");
        let null: Handle<Cup> = Handle(ptr::null(), PhantomData);
        assert!(null.free("cup").is_ok());
        assert_eq!(message(null.get("cup")), "cup: expected a t5g_cup, found NULL");
        let stray: Handle<Cup> = Handle(ptr::without_provenance(4096), PhantomData);
        assert_eq!(message(stray.get("cup")), "cup: expected a live t5g_cup, found a value that is not a handle");
    }

    #[test]
    fn an_object_that_is_freed_in_use_stays_until_the_call_is_over() {
        let cup = Handle::new(Cup(3));
        let held = cup.get("cup").expect("live");
        assert!(cup.free("cup").is_ok());
        assert_eq!((held.0, Arc::strong_count(&held.share())), (3, 2));
    }
}
