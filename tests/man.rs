//! `man/tp_*.3` are generated from the comments of `include/tproxy.h`, a page for each function.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// When the form of the pages last changed.
const DATE: &str = "2026-11-25";
/// mandoc's limit is 80 bytes.
const WIDTH: usize = 76;

/// The comment of a function, by its parts.
#[derive(Default)]
struct Call<'a> {
    name: &'a str,
    declaration: String,
    brief: String,
    description: Vec<Block>,
    parameters: Vec<(String, String)>,
    returns: Block,
    notes: Vec<Block>,
    since: String,
}

/// A paragraph: text, then a list of terms with their explanations, either of which may be empty.
#[derive(Default)]
struct Block {
    text: String,
    items: Vec<(String, String)>,
}

#[test]
fn committed_pages_match_the_header() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = fs::read_to_string(root.join("include/tproxy.h")).unwrap();
    let made: BTreeMap<String, String> =
        calls(&header).iter().map(|call| (format!("{}.3", call.name), page(call))).collect();
    assert!(made.len() > 15, "the header declares more than {} functions", made.len());

    let man = root.join("man");
    if std::env::var_os("UPDATE_MAN").is_some() {
        for name in committed_pages(&man).keys().filter(|name| !made.contains_key(*name)) {
            fs::remove_file(man.join(name)).unwrap();
        }
        for (name, text) in &made {
            fs::write(man.join(name), text).unwrap();
        }
    }
    let committed = committed_pages(&man);
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&committed), names(&made), "`UPDATE_MAN=1 cargo test --test man` regenerates the pages");
    for (name, text) in &made {
        assert!(
            committed[name] == *text,
            "man/{name} differs from the header; `UPDATE_MAN=1 cargo test --test man` regenerates it"
        );
    }
}

#[test]
fn references_between_pages_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = fs::read_to_string(root.join("include/tproxy.h")).unwrap();
    let known: BTreeSet<&str> = identifiers(&header).collect();
    for file in fs::read_dir(root.join("man")).unwrap() {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        // A title is in capitals.
        let text: String = text.split_inclusive('\n').filter(|line| !line.starts_with(".TH")).collect();
        let plain = text.replace("\\fB", "").replace("\\fP", "").replace("\\-", "-");
        for name in identifiers(&plain).filter(|name| name.starts_with("tp_") || name.starts_with("TP_")) {
            // "TP_RULES_ flags" names a group.
            let exists = known.contains(name) || (name.ends_with('_') && known.iter().any(|k| k.starts_with(name)));
            assert!(exists, "{}: {name} is not in the header", path.display());
        }
        for (at, _) in plain.match_indices(".BR tp") {
            let line = plain[at + 4..].lines().next().unwrap_or_default();
            let mut words = line.trim_end_matches(',').split(' ');
            let (name, section) = (words.next().unwrap(), words.next().unwrap().trim_start_matches('('));
            let section = section.split(')').next().unwrap();
            assert!(
                root.join(format!("man/{name}.{section}")).exists(),
                "{}: no page {name}({section})",
                path.display()
            );
        }
    }
}

fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

fn committed_pages(man: &Path) -> BTreeMap<String, String> {
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let paths = fs::read_dir(man).unwrap().map(|file| file.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "3"))
        .map(|p| (name(&p), fs::read_to_string(&p).unwrap()))
        .collect()
}

/// The functions of the header, with their comments.
fn calls(header: &str) -> Vec<Call<'_>> {
    let mut calls = Vec::new();
    for part in header.split("\n/**\n").skip(1) {
        let Some((comment, rest)) = part.split_once("*/\n") else { continue };
        let declaration = rest.split_inclusive(';').next().unwrap_or_default();
        let Some(open) = declaration.find('(') else { continue };
        if ["#", "struct ", "typedef "].iter().any(|start| declaration.starts_with(start)) {
            continue;
        }
        let name = declaration[..open].rsplit([' ', '*']).next().unwrap();
        calls.push(parse(name, comment, declaration));
    }
    calls
}

fn parse<'a>(name: &'a str, comment: &str, declaration: &str) -> Call<'a> {
    let lines: Vec<&str> = comment.lines().map(|line| line.strip_prefix(" * ").unwrap_or("")).collect();
    let mut call = Call { name, declaration: declaration.to_owned(), ..Call::default() };
    let mut after_tags = false;
    for (at, paragraph) in lines.split(|line| line.is_empty()).filter(|lines| !lines.is_empty()).enumerate() {
        if at == 0 {
            call.brief = block(paragraph).text;
        } else if paragraph[0].starts_with('@') {
            after_tags = true;
            let starts: Vec<usize> = (0..paragraph.len()).filter(|i| paragraph[*i].starts_with('@')).collect();
            for (i, start) in starts.iter().enumerate() {
                let end = starts.get(i + 1).copied().unwrap_or(paragraph.len());
                let (tag, rest) = paragraph[*start].split_once(' ').unwrap();
                let mut body = vec![rest.trim_start()];
                body.extend(&paragraph[start + 1..end]);
                match tag {
                    "@param" => {
                        let (parameter, text) = body[0].split_once(' ').unwrap();
                        let text = std::iter::once(text).chain(body[1..].iter().copied()).map(str::trim);
                        call.parameters.push((parameter.to_owned(), text.collect::<Vec<_>>().join(" ")));
                    }
                    "@return" => call.returns = block(&body),
                    "@since" => call.since = body[0].to_owned(),
                    other => panic!("{name}: unknown tag {other}"),
                }
            }
        } else if after_tags {
            call.notes.push(block(paragraph));
        } else {
            call.description.push(block(paragraph));
        }
    }
    assert!(!call.since.is_empty(), "{name}: no @since");
    call
}

/// Lines that are indented by two spaces begin an item: a term, two spaces, its explanation; or "- " and text.
fn block(lines: &[&str]) -> Block {
    let mut block = Block::default();
    for line in lines {
        let text = line.trim_start();
        let into = match (line.len() - text.len(), block.items.last_mut()) {
            (2, _) => {
                let bullet = text.strip_prefix("- ").map(|text| ("", text));
                let (term, text) = bullet.or_else(|| text.split_once("  ")).unwrap_or((text, ""));
                block.items.push((term.to_owned(), text.trim().to_owned()));
                continue;
            }
            (_, Some((_, explanation))) => explanation,
            (_, None) => &mut block.text,
        };
        if !into.is_empty() {
            into.push(' ');
        }
        into.push_str(text);
    }
    block
}

fn page(call: &Call) -> String {
    let mut out = ".\\\" Generated from include/tproxy.h: `UPDATE_MAN=1 cargo test --test man`\n".to_owned();
    out += &format!(".TH {} 3 {DATE} libtproxy \"Library functions\"\n", call.name.to_uppercase());
    let brief = call.brief.trim_end_matches('.');
    let lower = brief[..1].to_lowercase() + &brief[1..];
    out += &format!(".SH NAME\n{} \\-\n{}", call.name, text(&lower));
    out += &format!(".SH SYNOPSIS\n.nf\n.B #include <tproxy.h>\n.P\n{}.fi\n", declaration(&call.declaration));
    out += ".SH DESCRIPTION\n";
    // A call that needs no further words is described by its brief.
    if call.description.is_empty() {
        out += &text(&(brief.to_owned() + "."));
    }
    out += &paragraphs(&call.description);
    if !call.parameters.is_empty() {
        out += ".SH PARAMETERS\n";
        out += &list(&call.parameters);
    }
    if !call.returns.text.is_empty() {
        let returned = call.returns.text.trim_end_matches([':', '.']);
        let article = if returned.starts_with(|c: char| c.is_ascii_lowercase()) { "the " } else { "" };
        let set = if returned.ends_with("errno") { " set" } else { "" };
        out += &format!(".SH RETURN VALUE\n{}", text(&format!("Returns {article}{returned}{set}.")));
    }
    if !call.returns.items.is_empty() {
        out += &format!(".SH ERRORS\n{}", list(&call.returns.items));
    }
    if !call.notes.is_empty() {
        out += &format!(".SH NOTES\n{}", paragraphs(&call.notes));
    }
    out += &format!(".SH HISTORY\nAdded in libtproxy {}.\n.SH SEE ALSO\n", call.since);
    let mut related = references(call);
    related.insert(("7".to_owned(), "tproxy".to_owned()));
    related.remove(&("3".to_owned(), call.name.to_owned()));
    let related: Vec<String> = related.iter().map(|(section, name)| format!(".BR {name} ({section})")).collect();
    out + &related.join(",\n") + "\n"
}

/// A declaration, a parameter a line if it is long.
fn declaration(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (head, parameters) = words.split_once('(').unwrap();
    if words.len() <= WIDTH - 6 {
        return format!(".B \"{words}\"\n");
    }
    let parameters = parameters.split(", ").map(|p| format!("    {p}")).collect::<Vec<_>>().join(",\n");
    format!("{head}(\n{parameters}").lines().map(|line| format!(".B \"{line}\"\n")).collect()
}

fn paragraphs(blocks: &[Block]) -> String {
    let one = |block: &Block| text(&block.text) + &list(&block.items);
    blocks.iter().map(one).collect::<Vec<_>>().join(".P\n")
}

fn list(items: &[(String, String)]) -> String {
    let one = |(term, explanation): &(String, String)| match term.as_str() {
        "" => format!(".IP \\(bu 2\n{}", text(explanation)),
        _ => format!(".TP\n.B {term}\n{}", text(explanation)),
    };
    items.iter().map(one).collect()
}

/// Text in lines of at most `WIDTH`, each sentence on a new one; functions, pages and `code` in bold.
fn text(text: &str) -> String {
    let mut out = String::new();
    let mut line = String::new();
    let mut code = false;
    let words: Vec<&str> = text.split_whitespace().collect();
    for (at, word) in words.iter().enumerate() {
        let sentence = at > 0
            && words[at - 1].trim_end_matches(')').ends_with('.')
            && !words[at - 1].ends_with("...")
            && !word.starts_with(|c: char| c.is_ascii_lowercase());
        let made = formatted(word, &mut code);
        if !line.is_empty() && (sentence || line.len() + 1 + made.len() > WIDTH) {
            out += &line;
            out.push('\n');
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        } else if made.starts_with(['.', '\'']) {
            line.push_str("\\&");
        }
        line += &made;
    }
    if !line.is_empty() {
        out += &line;
        out.push('\n');
    }
    out
}

fn formatted(word: &str, code: &mut bool) -> String {
    if let Some((before, name, section, after)) = reference(word) {
        return format!("{before}\\fB{name}\\fP({section}){}", escaped(after));
    }
    let mut out = String::new();
    for (at, part) in word.split('`').enumerate() {
        if at > 0 {
            *code = !*code;
            out += if *code { "\\fB" } else { "\\fP" };
        }
        out += &escaped(part);
    }
    out
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// `tp_socket()`, `bind(2)`: what stands before it, the name, the section, what stands after it.
fn reference(word: &str) -> Option<(&str, &str, &str, &str)> {
    let name_at = word.find(|c| c != '(')?;
    let (before, rest) = word.split_at(name_at);
    let (name, rest) = rest.split_once('(')?;
    let (section, after) = rest.split_once(')')?;
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    match section {
        "" if is_name && name.starts_with("tp_") => Some((before, name, "3", after)),
        "1" | "2" | "3" | "5" | "7" | "8" if is_name => Some((before, name, section, after)),
        _ => None,
    }
}

/// The pages that a comment mentions, as section and name.
fn references(call: &Call) -> BTreeSet<(String, String)> {
    let blocks = call.description.iter().chain([&call.returns]).chain(&call.notes);
    let items = blocks.clone().flat_map(|b| &b.items).chain(&call.parameters).map(|(_, text)| text);
    let texts = blocks.map(|b| &b.text).chain(items).chain([&call.brief]);
    texts
        .flat_map(|text| text.split_whitespace())
        .filter_map(reference)
        .map(|(_, name, section, _)| (section.to_owned(), name.to_owned()))
        .collect()
}
