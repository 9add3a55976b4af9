//! Attention: the standard operator, over given keys and values, and `GroupQueryAttention`, over a past that is written into.
//!
//! ONNX Runtime's own take several passes over a square of scores, which a layer with a window mostly throws away, and wake
//! threads for the few numbers of a decoder step.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(super) mod head;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
#[cfg(target_arch = "x86_64")]
use std::sync::atomic::Ordering;

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::{Shape, TensorElementType};

use super::aligned::Aligned;
use super::{Parts, Side, spread};
use head::{Head, Room, TILES, Visible, WIDE, are_many, attend, length_of_turned, turned};

/// Fewer products than this are not worth waking another thread for, nor what takes as long to read.
const SHARED_FROM: usize = 250_000;
/// Products that take as long as reading a number.
const AS_READING: usize = 6;
/// Into so many parts rows and heads are dealt out where there are more.
const PARTS: usize = 64;
/// Queries that one thread takes at a time.
const SHARE: usize = 4 * TILES;

/// The number of an attribute, or what it is without being there.
fn attribute(node: &KernelContext, operator: &str, name: &str, default: Option<usize>) -> ort::Result<usize> {
    match node.get::<i64>(name) {
        None => default.ok_or_else(|| ort::Error::new(format!("{operator}: {name}: expected a number, found none"))),
        Some(number) => usize::try_from(number)
            .map_err(|_| ort::Error::new(format!("{operator}: {name}: expected no negative number, found {number}"))),
    }
}

fn soft_cap(node: &KernelContext) -> Option<f32> {
    node.get::<f32>("softcap").filter(|&cap| cap > 0.0)
}

fn four(operator: &str, shape: &Shape) -> ort::Result<[usize; 4]> {
    let sizes: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    sizes.try_into().map_err(|_| ort::Error::new(format!("{operator} of {shape}")))
}

/// `softmax(softcap(q·kᵀ·scale) where visible) · v`: queries `[batch, heads, queries, dim]`, keys and values
/// `[batch, kv_heads, keys, dim]`, visible bool, broadcast against `[batch, heads, queries, keys]`. Heads may lie side by side, too,
/// `[batch, queries, heads·dim]` and `[batch, keys, kv_heads·dim]`, if their numbers are given.
pub(super) struct Attention {
    pub side: Side,
    /// Whether the session has products of few bits, when all of its kernels are there.
    pub in_few_bits: Arc<AtomicBool>,
}

impl Operator for Attention {
    type Kernel<'attr> = OverGiven;

    fn name(&self) -> &str {
        "Attention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = || OperatorInput::required(TensorElementType::Float32);
        [float(), float(), float(), OperatorInput::required(TensorElementType::Bool)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<OverGiven> {
        let scale = node.get::<f32>("scale").ok_or_else(|| ort::Error::new("Attention: expected a scale"))?;
        if attribute(node, "Attention", "is_causal", Some(0))? != 0 {
            return Err(ort::Error::new("Attention: expected a mask for what is causal"));
        }
        Ok(OverGiven {
            scale,
            cap: soft_cap(node),
            heads: [
                attribute(node, "Attention", "q_num_heads", Some(0))?,
                attribute(node, "Attention", "kv_num_heads", Some(0))?,
            ],
            always_turns: self.side == Side::Encoder,
            in_few_bits: self.in_few_bits.clone(),
            #[cfg(target_arch = "x86_64")]
            halves: amx::Halves::default(),
            scratch: Scratch::default(),
            dealt: Deal::default(),
        })
    }
}

/// The kernel of one node.
pub(super) struct OverGiven {
    scale: f32,
    cap: Option<f32>,
    /// Few queries too, so that a source's numbers are the same whatever is encoded beside it.
    always_turns: bool,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no kernel there"))]
    in_few_bits: Arc<AtomicBool>,
    #[cfg(target_arch = "x86_64")]
    halves: amx::Halves,
    /// Numbers of heads, and of those of keys and values, where they lie side by side.
    heads: [usize; 2],
    scratch: Scratch,
    dealt: Deal,
}

/// What is brought into another order first, kept for its allocations: keys as [`turned`] makes them, and where heads lie side by
/// side, values and queries one behind the other.
#[derive(Default)]
struct Deal {
    turned: Aligned<f32>,
    values: Aligned<f32>,
    queries: Aligned<f32>,
}

/// Kept for its allocations.
#[derive(Default)]
struct Scratch {
    room: Room,
    context: Aligned<f32>,
}

/// Where the rows of heads `[batch, heads, rows, dim]` lie, one behind the other or those of all heads side by side.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Layout {
    batch: usize,
    heads: usize,
    rows: usize,
    dim: usize,
    is_side_by_side: bool,
}

impl Layout {
    /// Of a tensor of rank 4, or of rank 3 and so many heads.
    fn of(shape: &Shape, heads: usize) -> ort::Result<Layout> {
        if let &[batch, rows, width] = shape.as_ref()
            && heads > 0
            && (width as usize).is_multiple_of(heads)
        {
            let dim = width as usize / heads;
            return Ok(Layout { batch: batch as usize, heads, rows: rows as usize, dim, is_side_by_side: true });
        }
        let [batch, heads, rows, dim] = four("Attention", shape)?;
        Ok(Layout { batch, heads, rows, dim, is_side_by_side: false })
    }

    /// Where a row begins: of which item of the batch, of which head, which one.
    fn place(&self, item: usize, head: usize, row: usize) -> usize {
        match self.is_side_by_side {
            true => ((item * self.rows + row) * self.heads + head) * self.dim,
            false => ((item * self.heads + head) * self.rows + row) * self.dim,
        }
    }

    /// Numbers from a row of a head to the next.
    fn pitch(&self) -> usize {
        if self.is_side_by_side { self.heads * self.dim } else { self.dim }
    }

    /// Some rows of a head of an item, at least one, and what lies between them.
    fn part<'x>(&self, all: &'x [f32], [item, head]: [usize; 2], rows: Range<usize>) -> &'x [f32] {
        &all[self.place(item, head, rows.start)..self.place(item, head, rows.end - 1) + self.dim]
    }
}

/// A mask, `[rows, keys]`.
struct Mask<'m> {
    mask: &'m [bool],
    keys: usize,
    /// For each row what lies between the first and the last that it shows, and whether it shows all of that.
    rows: &'m [(Range<usize>, bool)],
    /// Queries that have rows of their own; the next ones have the same again.
    queries: usize,
}

impl Mask<'_> {
    fn row(&self, query: usize) -> usize {
        query % self.queries % self.rows.len()
    }
}

impl Visible for Mask<'_> {
    fn range(&self, query: usize) -> Range<usize> {
        self.rows[self.row(query)].0.clone()
    }

    fn seen(&self, query: usize, range: Range<usize>) -> Option<&[bool]> {
        let row = self.row(query);
        (!self.rows[row].1).then(|| &self.mask[row * self.keys..][range])
    }
}

/// What a row of a mask shows.
fn extent(row: &[bool]) -> (Range<usize>, bool) {
    const CHUNK: usize = 64;
    let any = |chunk: &[bool]| chunk.iter().fold(false, |any, &seen| any | seen);
    let Some(first) = row.chunks(CHUNK).position(any) else { return (0..0, true) };
    let first = first * CHUNK + row[first * CHUNK..].iter().position(|&seen| seen).unwrap_or(0);
    let last = row.rchunks(CHUNK).position(any).map_or(row.len(), |chunk| row.len() - chunk * CHUNK);
    let end = row[..last].iter().rposition(|&seen| seen).map_or(first, |at| at + 1);
    (first..end, row[first..end].iter().fold(true, |all, &seen| all & seen))
}

impl Kernel for OverGiven {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let input = |at: usize| context.input(at)?.ok_or_else(|| ort::Error::new("Attention: expected four inputs"));
        let [query, key, value, visible] = [input(0)?, input(1)?, input(2)?, input(3)?];
        let (of_query, queries) = query.try_extract_tensor::<f32>()?;
        let (of_key, keys) = key.try_extract_tensor::<f32>()?;
        let (of_value, values) = value.try_extract_tensor::<f32>()?;
        let (of_visible, mask) = visible.try_extract_tensor::<bool>()?;
        let (given, source) = (Layout::of(of_query, self.heads[0])?, Layout::of(of_key, self.heads[1])?);
        let Layout { batch, heads, rows: count, dim, .. } = given;
        let (kv_heads, length) = (source.heads, source.rows);
        // Axes that are not there are as those of size 1.
        let mut of_mask = [1; 4];
        for (to, &from) in of_mask.iter_mut().rev().zip(of_visible.iter().rev()) {
            *to = from as usize;
        }
        let [mask_batch, mask_heads, mask_rows, mask_keys] = of_mask;
        let fits = of_key == of_value
            && of_visible.len() <= 4
            && (source.batch, source.dim, mask_keys) == (batch, dim, length)
            && source.is_side_by_side == given.is_side_by_side
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && (mask_batch == batch || mask_batch == 1)
            && mask_heads == 1
            && (mask_rows == count || mask_rows == 1);
        if !fits {
            return Err(ort::Error::new(format!(
                "Attention of {of_query} over {of_key} and {of_value} where {of_visible}"
            )));
        }
        let mut output =
            context.output(0, of_query.to_vec())?.ok_or_else(|| ort::Error::new("Attention: the output is missing"))?;
        let (_, to) = output.try_extract_tensor_mut::<f32>()?;
        if to.is_empty() {
            return Ok(());
        }
        if length == 0 {
            to.fill(0.0);
            return Ok(());
        }

        let rows: Vec<(Range<usize>, bool)> = mask.chunks_exact(length).map(extent).collect();
        let visible = |item: usize| Mask {
            mask: &mask[item * mask_rows * length..][..mask_rows * length],
            keys: length,
            rows: &rows[item * mask_rows..][..mask_rows],
            queries: count,
        };
        #[cfg(target_arch = "x86_64")]
        if self.always_turns && self.in_few_bits.load(Ordering::Relaxed) && amx::takes(dim) {
            let seen = (0..mask_batch).map(|item| Some((visible(item), amx::Plan::of(visible(item).rows, count)?)));
            if let Some(seen) = seen.collect::<Option<Vec<_>>>() {
                let head = amx::Heads { scale: self.scale, cap: self.cap, layouts: [given, source] };
                // SAFETY: what it takes only processors with AMX have.
                return unsafe {
                    self.halves
                        .attend(head, &seen, [queries, keys, values], to, &|parts, work| spread(context, parts, work))
                };
            }
        }
        let (pairs, group) = (batch * kv_heads, heads / kv_heads);
        let (of_head, of_turned) = (length * dim, length_of_turned(length, dim));
        let turns = self.always_turns || are_many(count) || source.is_side_by_side;
        let Deal { turned: of_keys, values: of_values, queries: of_queries } = &mut self.dealt;
        let is_side_by_side = given.is_side_by_side;
        if turns {
            of_keys.resize(pairs * of_turned, 0.0);
            of_values.resize(if is_side_by_side { pairs * of_head } else { 0 }, 0.0);
            of_queries.resize(if is_side_by_side { queries.len() } else { 0 }, 0.0);
            let to = [&mut *of_keys, of_values, of_queries].map(|to| Parts::new(to));
            let [panels, parts] = [length, if is_side_by_side { count } else { 0 }].map(|rows| rows.div_ceil(WIDE));
            // All heads of a few tokens at a time: so they are read in the order in which they lie.
            spread(context, batch * (panels + parts), &|part| {
                let (item, panel) = (part / (panels + parts), part % (panels + parts));
                let is_key = panel < panels;
                let (from, first) = if is_key { (source, panel * WIDE) } else { (given, (panel - panels) * WIDE) };
                let range = first..from.rows.min(first + WIDE);
                for head in 0..from.heads {
                    let place = ((item * from.heads + head) * from.rows + first) * dim;
                    let place = place..place + range.len() * dim;
                    if is_key {
                        let at = (item * from.heads + head) * of_turned + first * dim;
                        // SAFETY: every panel is taken by one call only.
                        let to = unsafe { to[0].of(at..at + WIDE * dim) };
                        turned(from.part(keys, [item, head], range.clone()), [from.pitch(), dim], to);
                    }
                    if is_side_by_side {
                        let (x, to) = if is_key { (values, &to[1]) } else { (queries, &to[2]) };
                        let x = from.part(x, [item, head], range.clone()).chunks(from.pitch());
                        // SAFETY: as above.
                        let to = unsafe { to.of(place) }.chunks_exact_mut(dim);
                        to.zip(x).for_each(|(to, x)| to.copy_from_slice(&x[..dim]));
                    }
                }
            })?;
        }
        let (queries, values) = if is_side_by_side { (&of_queries[..], &of_values[..]) } else { (queries, values) };
        // The heads of a group are as more queries of one head.
        let together = group * count;
        let to = Parts::new(to);
        let compute = |pair: usize, range: Range<usize>, scratch: &mut Scratch| {
            let Scratch { room, context } = scratch;
            let first = pair * together;
            let visible = visible(if mask_batch == 1 { 0 } else { pair / kv_heads });
            let head = Head {
                queries: &queries[(first + range.start) * dim..(first + range.end) * dim],
                // Turned keys are taken instead where these do not lie one behind the other.
                keys: if is_side_by_side { &[] } else { &keys[pair * of_head..][..of_head] },
                values: &values[pair * of_head..][..of_head],
                turned: turns.then(|| &of_keys[pair * of_turned..][..of_turned]),
                dim,
                scale: self.scale,
                cap: self.cap,
            };
            if !is_side_by_side {
                // SAFETY: every query of a pair is taken by one call only.
                let to = unsafe { to.of((first + range.start) * dim..(first + range.end) * dim) };
                return attend(head, &visible, range, room, to);
            }
            context.resize(range.len() * dim, 0.0);
            attend(head, &visible, range.clone(), room, context);
            for (query, from) in range.zip(context.chunks_exact(dim)) {
                let (head, row) = (pair % kv_heads * group + query / count, query % count);
                let place = given.place(pair / kv_heads, head, row);
                // SAFETY: as above.
                unsafe { to.of(place..place + dim) }.copy_from_slice(from);
            }
        };
        if pairs * together.max(AS_READING) * of_head < SHARED_FROM {
            (0..pairs).for_each(|pair| compute(pair, 0..together, &mut self.scratch));
            return Ok(());
        }
        let shares = together.div_ceil(SHARE);
        spread(context, pairs * shares, &|part| {
            let (pair, first) = (part / shares, part % shares * SHARE);
            compute(pair, first..together.min(first + SHARE), &mut Scratch::default());
        })
    }
}

/// Causal attention with rotary positions over a past that has room for what is new; see
/// `t5gemma_graphs::onnx::Value::group_query_attention`.
pub(super) struct GroupQueryAttention;

impl Operator for GroupQueryAttention {
    type Kernel<'attr> = OverPast;

    fn name(&self) -> &str {
        "GroupQueryAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let (float, int) = (TensorElementType::Float32, TensorElementType::Int32);
        [
            OperatorInput::required(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
            OperatorInput::required(int),
            OperatorInput::required(int),
            OperatorInput::required(float),
            OperatorInput::required(float),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [(); 3].map(|()| OperatorOutput::required(TensorElementType::Float32))
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<OverPast> {
        const NAME: &str = "GroupQueryAttention";
        let [heads, kv_heads] =
            [attribute(node, NAME, "num_heads", None)?, attribute(node, NAME, "kv_num_heads", None)?];
        let scale = node.get::<f32>("scale").ok_or_else(|| ort::Error::new(format!("{NAME}: expected a scale")))?;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(ort::Error::new(format!("{NAME}: {heads} heads over {kv_heads}")));
        }
        if attribute(node, NAME, "do_rotary", Some(0))? != 1
            || attribute(node, NAME, "rotary_interleaved", Some(0))? != 0
        {
            return Err(ort::Error::new(format!("{NAME}: expected rotary positions, not interleaved")));
        }
        let window = node.get::<i64>("local_window_size").and_then(|window| usize::try_from(window).ok());
        Ok(OverPast { heads, kv_heads, scale, cap: soft_cap(node), window, room: PastRoom::default() })
    }
}

/// The kernel of one node.
pub(super) struct OverPast {
    heads: usize,
    kv_heads: usize,
    scale: f32,
    cap: Option<f32>,
    /// Positions that a query sees, itself included.
    window: Option<usize>,
    room: PastRoom,
}

#[derive(Default)]
struct PastRoom {
    scratch: Scratch,
    queries: Aligned<f32>,
    turned: Aligned<f32>,
}

/// Where a past begins.
struct Past(*const f32);

// SAFETY: plain memory that is only read.
unsafe impl Sync for Past {}
// SAFETY: as above.
unsafe impl Send for Past {}

impl Past {
    fn start(&self) -> *const f32 {
        self.0
    }
}

/// New tokens behind a past: each sees itself and what came before it, within the window.
struct Causal {
    past: usize,
    /// New tokens; the next queries are the same tokens again.
    new: usize,
    window: Option<usize>,
}

impl Visible for Causal {
    fn range(&self, query: usize) -> Range<usize> {
        let end = self.past + query % self.new + 1;
        end - self.window.unwrap_or(end).clamp(1, end)..end
    }

    fn seen(&self, _: usize, _: Range<usize>) -> Option<&[bool]> {
        None
    }
}

impl Kernel for OverPast {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let wrong = |what: &str| ort::Error::new(format!("GroupQueryAttention: {what}"));
        let inputs = context.num_inputs()?;
        if inputs != 9 {
            return Err(wrong(&format!("expected nine inputs, found {inputs}")));
        }
        let input = |at: usize| context.input(at)?.ok_or_else(|| wrong(&format!("input {at} is missing")));
        let [packed, last, total, cos, sin] = [input(0)?, input(5)?, input(6)?, input(7)?, input(8)?];
        let past = [context.input(3)?, context.input(4)?];
        let (of_packed, packed) = packed.try_extract_tensor::<f32>()?;
        let (_, last) = last.try_extract_tensor::<i32>()?;
        let (_, total) = total.try_extract_tensor::<i32>()?;
        let ((of_tables, cos), (_, sin)) = (cos.try_extract_tensor::<f32>()?, sin.try_extract_tensor::<f32>()?);
        let past = match &past {
            [Some(key), Some(value)] => Some([key.try_extract_tensor::<f32>()?, value.try_extract_tensor::<f32>()?]),
            _ => None,
        };
        let &mut OverPast { heads, kv_heads, scale, cap, window, .. } = self;
        let width = heads + 2 * kv_heads;
        let &[rows, new, across] = of_packed.as_ref() else { return Err(wrong(&format!("of {of_packed}"))) };
        let [rows, new, dim] = [rows as usize, new as usize, across as usize / width];
        let room = past.as_ref().map_or(Ok(0), |[(of_key, _), (of_value, _)]| match four("the past", of_key)? {
            [key_rows, key_heads, room, key_dim]
                if of_key == of_value && (key_rows, key_heads, key_dim) == (rows, kv_heads, dim) =>
            {
                Ok(room)
            }
            _ => Err(wrong(&format!("{of_packed} over a past of {of_key} and {of_value}"))),
        })?;
        let total = total.first().map_or(0, |&total| total.max(0) as usize);
        let capacity = room.max(total);
        let ends: Vec<usize> = last.iter().map(|&last| (i64::from(last).max(-1) + 1) as usize).collect();
        let half = dim / 2;
        let positions = of_tables.first().map_or(0, |&positions| positions as usize);
        let fits = ends.len() == rows
            && dim > 0
            && dim * width == across as usize
            && dim % 2 == 0
            && cos.len() == positions * half
            && sin.len() == cos.len()
            && ends.iter().all(|&end| end >= new && end <= capacity.min(positions) && end - new <= room);
        if !fits {
            let tables = format!("{of_tables} angles");
            return Err(wrong(&format!("{of_packed} up to {ends:?} of {capacity} positions with {tables}")));
        }
        let missing = || wrong("an output is missing");
        let cached = vec![rows as i64, kv_heads as i64, capacity as i64, dim as i64];
        let mut attended =
            context.output(0, vec![rows as i64, new as i64, (heads * dim) as i64])?.ok_or_else(missing)?;
        let mut key = context.output(1, cached.clone())?.ok_or_else(missing)?;
        let mut value = context.output(2, cached)?.ok_or_else(missing)?;
        let attended = Parts::new(attended.try_extract_tensor_mut::<f32>()?.1);
        let present =
            [Parts::new(key.try_extract_tensor_mut::<f32>()?.1), Parts::new(value.try_extract_tensor_mut::<f32>()?.1)];
        // No more than addresses: it may be the memory of the present.
        let past = past.map(|past| past.map(|(_, numbers)| Past(numbers.as_ptr())));

        let group = heads / kv_heads;
        let rotated = |x: &[f32], position: usize, to: &mut [f32]| {
            let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
            for at in 0..half {
                let [a, b] = [x[at], x[at + half]];
                to[at] = a * cos[at] - b * sin[at];
                to[at + half] = b * cos[at] + a * sin[at];
            }
        };
        let compute = |part: usize, scratch: &mut PastRoom| {
            let (row, of_kv) = (part / kv_heads, part % kv_heads);
            let (end, place) = (ends[row], part * capacity * dim);
            let before = end - new;
            let token = |at: usize, head: usize| &packed[((row * new + at) * width + head) * dim..][..dim];
            // SAFETY: every row and head is taken by one call only; a past is read before it is written, where it is the same
            // memory.
            let [keys, values] = [0, 1].map(|which| unsafe {
                let to = present[which].of(place..place + capacity * dim);
                if let Some(past) = past.as_ref().map(|past| past[which].start())
                    && past != present[which].start()
                {
                    let from = past.add(part * room * dim);
                    std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), before * dim);
                }
                to
            });
            for at in 0..new {
                rotated(token(at, heads + of_kv), before + at, &mut keys[(before + at) * dim..][..dim]);
                values[(before + at) * dim..][..dim].copy_from_slice(token(at, heads + kv_heads + of_kv));
            }
            // As in `OverGiven`, more heads are as more queries.
            let PastRoom { scratch: Scratch { room, context }, queries, turned: keys_turned } = scratch;
            queries.resize(group * new * dim, 0.0);
            context.resize(group * new * dim, 0.0);
            for (at, to) in queries.chunks_exact_mut(dim).enumerate() {
                rotated(token(at % new, of_kv * group + at / new), before + at % new, to);
            }
            let turns = are_many(new);
            if turns {
                keys_turned.resize(length_of_turned(end, dim), 0.0);
                turned(&keys[..end * dim], [dim; 2], keys_turned);
            }
            let head = Head {
                queries,
                keys: &keys[..end * dim],
                values: &values[..end * dim],
                turned: turns.then_some(&keys_turned[..]),
                dim,
                scale,
                cap,
            };
            attend(head, &Causal { past: before, new, window }, 0..group * new, room, context);
            for (at, from) in context.chunks_exact(dim).enumerate() {
                let place = ((row * new + at % new) * heads + of_kv * group + at / new) * dim;
                // SAFETY: as above.
                unsafe { attended.of(place..place + dim) }.copy_from_slice(from);
            }
        };
        let parts = rows * kv_heads;
        let longest = ends.iter().copied().max().unwrap_or(0);
        if parts * (group * new).max(AS_READING) * longest * dim < SHARED_FROM {
            (0..parts).for_each(|part| compute(part, &mut self.room));
            return Ok(());
        }
        // Several at a time find the memory that the one before has asked for.
        let taken = parts.div_ceil(PARTS);
        spread(context, parts.div_ceil(taken), &|share| {
            let mut room = PastRoom::default();
            (share * taken..parts.min((share + 1) * taken)).for_each(|part| compute(part, &mut room));
        })
    }
}
