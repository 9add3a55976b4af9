//! The steps of writing outputs, and the windows whose rows are being answered.

use std::collections::VecDeque;

use arrow_array::RecordBatch;
use t5gemma_protocol::TokenizedRequest;

use crate::answer::Answered;
use crate::reader::{Carried, Window};

/// A step of writing, in order.
pub enum Step {
    Begin { shard: usize, carried: Option<RecordBatch> },
    Window(Box<Active>),
    End { shard: usize, result: Result<(), String> },
}

/// A window whose rows are being answered.
pub struct Active {
    pub shard: usize,
    pub chunks: Vec<Carried>,
    /// `None` for rows that have been answered.
    pub requests: Vec<Option<TokenizedRequest>>,
    pub answers: Vec<Option<Answered>>,
    /// The rows to submit, in order.
    pub todo: VecDeque<usize>,
    /// The number of rows without an answer.
    pub left: usize,
    pub part_read: f64,
}

impl Active {
    pub fn new(shard: usize, window: Window) -> Active {
        let mut requests = Vec::with_capacity(window.rows.len());
        let mut answers = Vec::with_capacity(window.rows.len());
        for row in window.rows {
            let (request, answer) = match row {
                Ok(request) => (Some(request), None),
                Err(problem) => (None, Some(Err(problem))),
            };
            requests.push(request);
            answers.push(answer);
        }
        let mut todo: Vec<usize> = (0..requests.len()).filter(|&row| requests[row].is_some()).collect();
        let length = |row: &usize| requests[*row].as_ref().map_or(0, |request| request.sources[0].len());
        todo.sort_by_key(|row| std::cmp::Reverse(length(row)));
        let left = todo.len();
        Active { shard, chunks: window.chunks, requests, answers, todo: todo.into(), left, part_read: window.part_read }
    }

    pub fn answer(&mut self, row: usize, answer: Answered) {
        self.requests[row] = None;
        self.answers[row] = Some(answer);
        self.left -= 1;
    }

    /// Takes the rows of the next batch: neighbours with equal options and decoder prompts.
    pub fn batch(&mut self, most: usize) -> Vec<usize> {
        // Seeds are of rows, not of batches.
        let kind = |active: &Active, row: usize| {
            let request = active.requests[row].as_ref().expect("rows to do have requests");
            let mut options = request.options.clone();
            options.remove("seed");
            (request.prompts.clone(), request.adapter.is_some(), request.progress_totals.is_some(), options)
        };
        let Some(first) = self.todo.pop_front() else { return Vec::new() };
        let of_first = kind(self, first);
        let mut rows = vec![first];
        while rows.len() < most
            && let Some(&next) = self.todo.front()
            && kind(self, next) == of_first
        {
            rows.extend(self.todo.pop_front());
        }
        rows
    }
}
