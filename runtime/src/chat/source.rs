//! Rewrites a template's source for `minijinja`: newlines become `\n`, as in Jinja, and syntax of Jinja and
//! transformers that `minijinja` lacks is expressed in another way or refused by name.

/// The filter that replaces `"…" % values`.
pub(super) const PERCENT: &str = "format_percent";
/// The filter that is applied to the right operand of `+`.
pub(super) const ADDED: &str = "added";

/// The source for `minijinja`.
///
/// # Errors
/// Syntax that `minijinja` cannot express.
pub(super) fn prepared(source: &str) -> Result<String, String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    // The head of the enclosing macro.
    let mut of_macro: Option<String> = None;
    while let Some(at) = ["{{", "{%", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        let (data, tag) = rest.split_at(at);
        out.push_str(data);
        let at = source.len() - tag.len();
        if tag.starts_with("{#") {
            let end = tag.find("#}").map_or(tag.len(), |end| end + 2);
            out.push_str(&tag[..end]);
            rest = &tag[end..];
            continue;
        }
        let (tokens, after) = tokens(tag);
        rest = after;
        let words: Vec<&str> = tokens.iter().filter(|token| token.kind == Kind::Name).map(|token| token.text).collect();
        let is_block = tag.starts_with("{%");
        match words.as_slice() {
            ["raw"] if is_block => {
                let end = end_of_raw(rest);
                out.push_str(&tag[..tag.len() - rest.len() + end]);
                rest = &rest[end..];
                continue;
            }
            // Marks an assistant's text for training; variables set inside stay local.
            ["generation"] if is_block => {
                tokens
                    .iter()
                    .for_each(|token| out.push_str(if token.text == "generation" { "with" } else { token.text }));
                continue;
            }
            ["endgeneration"] if is_block => {
                let text = |token: &Token| {
                    if token.text == "endgeneration" { "endwith".into() } else { token.text.to_string() }
                };
                tokens.iter().for_each(|token| out.push_str(&text(token)));
                continue;
            }
            ["macro", ..] if is_block => of_macro = Some(words.join(" ")),
            ["endmacro", ..] if is_block => of_macro = None,
            _ => {}
        }
        if let Some(head) = &of_macro {
            let is_surplus =
                |name: &&str| ["varargs", "kwargs"].contains(name) && !head.split(' ').any(|word| word == *name);
            if let Some(name) = names(&tokens).find(is_surplus) {
                let line = source[..at].matches('\n').count() + 1;
                return Err(format!("{name} of a macro is not supported (line {line} of the template)"));
            }
        }
        write(&tokens, &mut out);
    }
    Ok(out + rest)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Space,
    Name,
    Text,
    Number,
    /// A single character, or a delimiter of the tag.
    Sign,
}

#[derive(Clone, Copy, Debug)]
struct Token<'s> {
    kind: Kind,
    text: &'s str,
}

/// The tokens of a tag with its delimiters, and the rest of the source.
fn tokens(tag: &str) -> (Vec<Token<'_>>, &str) {
    let close = if tag.starts_with("{%") { "%}" } else { "}}" };
    let mut tokens = vec![Token { kind: Kind::Sign, text: &tag[..2] }];
    let mut rest = &tag[2..];
    let mut depth = 0_usize;
    while let Some(first) = rest.chars().next() {
        if depth == 0 && rest.starts_with(close) {
            tokens.push(Token { kind: Kind::Sign, text: &rest[..2] });
            return (tokens, &rest[2..]);
        }
        let run = |is_in: &dyn Fn(char) -> bool| rest.find(|c| !is_in(c)).unwrap_or(rest.len());
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let (kind, end) = match first {
            '\'' | '"' => (Kind::Text, end_of_text(rest, first)),
            _ if first.is_whitespace() => (Kind::Space, run(&char::is_whitespace)),
            '0'..='9' => (Kind::Number, run(&|c| is_word(c) || c == '.')),
            _ if is_word(first) => (Kind::Name, run(&is_word)),
            _ => (Kind::Sign, first.len_utf8()),
        };
        match first {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        tokens.push(Token { kind, text: &rest[..end] });
        rest = &rest[end..];
    }
    (tokens, rest)
}

fn end_of_text(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The offset of the tag that ends a raw block.
fn end_of_raw(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        let inner = text[from + at + 2..].trim_start_matches(['-', '+']).trim_start();
        if inner.starts_with("endraw") {
            return from + at;
        }
        from += at + 2;
    }
    text.len()
}

/// The names of variables, without those of attributes and keyword arguments.
fn names<'s>(tokens: &'s [Token<'s>]) -> impl Iterator<Item = &'s str> {
    let visible: Vec<&Token> = tokens.iter().filter(|token| token.kind != Kind::Space).collect();
    let is_variable = move |at: usize| {
        let before = at.checked_sub(1).map(|before| visible[before].text);
        let after = visible.get(at + 1).map(|token| token.text);
        let is_argument = after == Some("=") && visible.get(at + 2).is_none_or(|token| token.text != "=");
        (visible[at].kind == Kind::Name && before != Some(".") && !is_argument).then_some(visible[at].text)
    };
    (0..tokens.iter().filter(|token| token.kind != Kind::Space).count()).filter_map(is_variable)
}

/// Writes tokens: `"…" % values` as a filter, and a filter behind the right operand of `+`. `minijinja` adds lists
/// lazily, so that a list that is doubled again and again would cost nothing until it is read, and then more memory
/// than there is.
fn write(tokens: &[Token], out: &mut String) {
    let mut at = 0;
    let mut is_text = false;
    while let Some(token) = tokens.get(at) {
        at += 1;
        if token.kind == Kind::Space {
            out.push_str(token.text);
            continue;
        }
        if is_text && token.text == "%" {
            let end = at + operand(&tokens[at..]);
            out.push_str(&format!("|{PERCENT}("));
            write(&tokens[at..end], out);
            out.push(')');
            at = end;
            continue;
        }
        is_text = token.kind == Kind::Text;
        out.push_str(token.text);
        let is_behind_delimiter = at >= 2 && tokens[at - 2].text.starts_with('{') && tokens[at - 2].text.len() == 2;
        if token.text == "+" && !is_behind_delimiter {
            let end = at + operand(&tokens[at..]);
            let is_of_delimiter = tokens[at..end].iter().any(|token| matches!(token.text, "%}" | "}}"));
            if end > at && !is_of_delimiter {
                out.push('(');
                write(&tokens[at..end], out);
                out.push_str(&format!(")|{ADDED}"));
                at = end;
            }
        }
    }
}

/// The number of tokens of an operator's right operand.
fn operand(tokens: &[Token]) -> usize {
    let next = |at: usize| (at..tokens.len()).find(|&at| tokens[at].kind != Kind::Space);
    let Some(mut at) = next(0) else { return 0 };
    while matches!(tokens[at].text, "-" | "+") {
        match next(at + 1) {
            Some(after) => at = after,
            None => return tokens.len(),
        }
    }
    let group = |from: usize| {
        let mut depth = 0_usize;
        for (at, token) in tokens.iter().enumerate().skip(from) {
            match token.text {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return at + 1;
            }
        }
        tokens.len()
    };
    let mut end = if matches!(tokens[at].text, "(" | "[" | "{") { group(at) } else { at + 1 };
    while let Some(at) = next(end) {
        end = match tokens[at].text {
            "." | "|" => next(at + 1).map_or(tokens.len(), |name| name + 1),
            "(" | "[" => group(at),
            _ => break,
        };
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_minijinja_lacks_is_rewritten() {
        for (source, expected) in [
            ("a{%- generation -%}b{% endgeneration %}", "a{%- with -%}b{% endwith %}"),
            ("{% if x %}{{ generation }}{% endif %}", "{% if x %}{{ generation }}{% endif %}"),
            ("{{ '{% generation %}' }}{# {% generation %} #}", "{{ '{% generation %}' }}{# {% generation %} #}"),
            ("{% raw %}{% generation %}\"%s\" % a{%- endraw %}", "{% raw %}{% generation %}\"%s\" % a{%- endraw %}"),
            ("{% broken", "{% broken"),
            ("{%}", "{%}"),
            ("a\r\nb\rc\n\n{{ '\r\n' }}", "a\nb\nc\n\n{{ '\n' }}"),
            ("{{ 7 % 2 }}{{ a % 'x' }}100 % 'a' %", "{{ 7 % 2 }}{{ a % 'x' }}100 % 'a' %"),
            ("{{ \"%s\" % x }}", "{{ \"%s\" |format_percent( x) }}"),
            (
                "{{ '%s %s' % (a, b.c[0](1))|upper ~ 'x' }}",
                "{{ '%s %s' |format_percent( (a, b.c[0](1))|upper) ~ 'x' }}",
            ),
            ("{% set a = '%d' % -1 %}", "{% set a = '%d' |format_percent( -1) %}"),
            (
                "{{ '%s%%s' % a % ('%s' % b) }}",
                "{{ '%s%%s' |format_percent( a) |format_percent( ('%s' |format_percent( b))) }}",
            ),
            ("{{ {'a': {'b': 1}}['a'] }}%}", "{{ {'a': {'b': 1}}['a'] }}%}"),
            ("{%+ if a + b.c(d + 1)[0] * 2 +%}", "{%+ if a +( b.c(d +( 1)|added)[0])|added * 2 +%}"),
            ("{{ 'a' + 'b' + -c|d }}{{+ x }}", "{{ 'a' +( 'b')|added +( -c|d)|added }}{{+ x }}"),
        ] {
            assert_eq!(prepared(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn syntax_that_cannot_be_expressed_is_named() {
        let surplus = "a\n{% macro f(a) %}{{ varargs | length }}{% endmacro %}";
        assert_eq!(prepared(surplus), Err("varargs of a macro is not supported (line 2 of the template)".into()));
        let own = "{% macro f(kwargs) %}{{ kwargs }}{{ x.varargs }}{{ f(varargs=1) }}{% endmacro %}{{ kwargs }}";
        assert_eq!(prepared(own).as_deref(), Ok(own));
    }
}
