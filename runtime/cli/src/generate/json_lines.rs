//! The end of `t5gemma generate --help`.

/// The format of JSON lines, and examples.
pub const JSON_LINES: &str = r#"JSON lines (--jsonl):
Each line of stdin is a request, each line of stdout its result, in the same order:

  request  {"id"?, "text" | "messages" | "input_ids", "attention_mask"?,
            "images"? | "pixel_values"?, "pan_and_scan"?,
            "decoder_text"? | "decoder_input_ids"?, "progress_total"?,
            "options"?}
  result   {"id", "sequences": [[{"tokens", "text"?, "score"?,
            "finish_reason", "logprob"?, "logprobs"?, "top_logprobs"?,
            "cross_attentions"?}, ...], ...], "seed"?, "usage"}
  or       {"id", "error"}

Fields of a request:
  id                 string or number [default: the line's number from 0]
  text               string, or list of strings
  messages           conversation: list of {"role", "content"}
  input_ids          token ids: one row, or a list of rows of equal length
  attention_mask     0 for padding tokens in input_ids, 1 for others
  images             an image for each <start_of_image> of the text, or for the
                     image tokens of input_ids: a list of files (JPEG, PNG,
                     WebP) and data URIs, or for several sources a list of lists
  pixel_values       exact pixel values instead, {"file", "tensor"}: float32
                     [images, 3, size, size] of a safetensors file
  pan_and_scan       whether crops follow images that are much wider than high
                     or the reverse [default: as the model's settings say]
  decoder_text       beginning of the target, without special tokens
  decoder_input_ids  the same as token ids
  progress_total     expected length of the target in tokens, the start token
                     included, for models that require it: an integer, or a
                     list of them
  options            generation options, which override the flags

Fields of a result:
  sequences          for each source, its targets, best first
  tokens             generated ids, with the end token but without the prompt
  score              beam search score
  finish_reason      eos, length, stop_string, time, constraint or
                     constraint_incomplete (ended without meeting it)
  logprobs           with output_logprobs: log-probability of each token before
                     any processing; logprob is their sum
  top_logprobs       [token, log-probability] of the most likely tokens
  cross_attentions   attention of each token to each source token
  seed               random seed, with do_sample
  usage              {"source_tokens", "target_tokens"}

Waiting requests with the same options run as one batch. With a model exported with --target cpu, requests with different options share decoder steps too, and later requests join a running batch. The result of an invalid line is its error; blank lines are skipped.

Examples:
  Generate with four beams, from arguments or from the lines of a file:
    t5gemma generate model --num-beams 4 'Dr. Smith paid $3.50.'
    t5gemma generate model --num-beams 4 < texts.txt

  Chat with an instruction-tuned model:
    t5gemma generate model --chat --max-new-tokens 200 'Why is the sky blue?'

  Answer JSON requests on two GPUs:
    t5gemma generate model --jsonl --provider cuda --device 0,1 < requests.jsonl

  Answer requests that choose one of two LoRA adapters, or none:
    t5gemma generate model --jsonl --adapter law=law-lora --adapter news=news-lora < requests.jsonl

  Ask about an image, with a model that reads images:
    t5gemma generate model --image photo.jpg '<start_of_image> in this image, there is'

  Generate JSON that satisfies a schema:
    t5gemma generate model --json-schema schema.json 'Room 12 costs $80.'"#;
