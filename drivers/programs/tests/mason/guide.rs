//! The blocks of the user's guide.

use super::Machine;

const GUIDE: &str = include_str!("../../../../docs/user/mason.md");

/// The fenced blocks in `language`, with their numbers among all blocks.
fn blocks() -> Vec<(&'static str, String)> {
    let mut blocks = Vec::new();
    let mut lines = GUIDE.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push((language, block.join("\n") + "\n"));
        }
    }
    blocks
}

/// Texts are stored and must be laid out; commands must print what stands below them.
#[test]
fn the_guide_says_what_happens() {
    let machine = Machine::new();
    let (mut texts, mut commands) = (0, 0);
    for (language, block) in blocks() {
        match language {
            "mason" => {
                let (first, text) = block.split_once('\n').unwrap();
                let path = first.strip_prefix("// file: ").expect("it says which file it is");
                machine.put(path, text);
                assert_eq!(machine.run(&format!("mason fmt --check {path}")), (0, String::new()), "{path}");
                texts += 1;
            }
            "sh" => {
                for part in block.split("$ ").filter(|part| !part.is_empty()) {
                    let (command, expected) = part.split_once('\n').unwrap();
                    let (_, found) = machine.run(command);
                    assert_eq!(found + "\n", expected, "{command}");
                    commands += 1;
                }
            }
            _ => {}
        }
    }
    assert!(texts >= 4 && commands >= 10, "{texts} texts and {commands} commands");
}
