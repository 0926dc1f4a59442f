//! `plugvisor doctor`: what this host can enforce, what it lacks, and what to do about it.

use plugvisor_proto::admin::v1::{
    ExamineHostRequest, ExamineHostResponse, HostControl, HostLevel, HostPlace, LevelGap,
};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::{Line, Style, Table};

/// Asks the running supervisor.
pub(crate) async fn ask(admin: &Admin) -> Result<ExamineHostResponse, Failure> {
    admin
        .ask("doctor", QUESTION, ExamineHostRequest {}, |mut client, question| async move {
            client.examine_host(question).await
        })
        .await
}

/// Prints the report; [`Outcome::Degraded`] when something is lacking.
pub(crate) fn report(output: &Output, answer: &ExamineHostResponse) -> Result<(), Failure> {
    match output.format {
        Format::Table | Format::Wide => print(output, answer)?,
        Format::Json | Format::Jsonl => {
            output.json(&output.to_json("plugvisor.admin.v1.ExamineHostResponse", answer)?)?;
        }
        Format::Name => lacking(answer).try_for_each(|control| output.line(&Line::new(&control.name)))?,
    }
    let well = lacking(answer).next().is_none() && answer.places.iter().all(|place| place.trouble.is_empty());
    if well { Ok(()) } else { Err(Failure::silent(Outcome::Degraded)) }
}

fn lacking(answer: &ExamineHostResponse) -> impl Iterator<Item = &HostControl> {
    answer.controls.iter().filter(|control| control.works.is_empty())
}

/// Whether plugins run at this level, and without what.
fn level_line(HostLevel { name: _, gaps }: &HostLevel) -> (Style, &'static str, String) {
    let names = |gaps: &[&LevelGap]| gaps.iter().map(|gap| gap.control.as_str()).collect::<Vec<_>>().join(", ");
    let (allowed, refused): (Vec<&LevelGap>, Vec<&LevelGap>) = gaps.iter().partition(|gap| gap.allowed);
    match (allowed.as_slice(), refused.as_slice()) {
        ([], []) => (Style::Good, "works", String::new()),
        (allowed, []) => (Style::Warning, "works, allowed", format!("without {}", names(allowed))),
        (_, [LevelGap { control, why, .. }]) if control.is_empty() => (Style::Bad, "REFUSED", why.clone()),
        (_, refused) => (Style::Bad, "REFUSED", format!("lacks {}", names(refused))),
    }
}

/// What to do about a level that is refused for more than a wall that is told of below.
fn levels_fixes(output: &Output, answer: &ExamineHostResponse) -> Result<(), Failure> {
    let told = |gap: &LevelGap| lacking(answer).any(|control| control.fix == gap.fix);
    for HostLevel { name, gaps } in &answer.levels {
        for gap in gaps.iter().filter(|gap| !gap.control.is_empty() && !told(gap)) {
            let LevelGap { control, why, fix, .. } = gap;
            output.line(
                &Line::new("  ")
                    .add(Style::Title, format!("{control} at {name}"))
                    .add(Style::Plain, format!(": {why}")),
            )?;
            output.line(&Line::new("    fix: ").add(Style::Plain, fix))?;
        }
    }
    Ok(())
}

fn print(output: &Output, answer: &ExamineHostResponse) -> Result<(), Failure> {
    let who = match answer.user.as_str() {
        "" => format!("uid {}", answer.uid),
        user => format!("uid {}, becoming {user}", answer.uid),
    };
    let how = if answer.running {
        "as the running supervisor found"
    } else {
        "no supervisor runs; its launcher was started for a trial"
    };
    output.line(&Line::new(format!("{}, {who}: {how}", answer.kernel)))?;
    output.title("Walls")?;
    let mut table = Table::new(&[]);
    for HostControl { name, works, why: _, fix: _, allowed } in &answer.controls {
        let (style, mark) = match (works.is_empty(), allowed) {
            (false, _) => (Style::Good, "works"),
            (true, true) => (Style::Warning, "lacks, allowed"),
            (true, false) => (Style::Bad, "LACKS"),
        };
        table.row(vec![Line::new(format!("  {name}")), Line::default().add(style, mark), Line::new(works)]);
    }
    output.lines(&table.lines()[1..])?;
    output.title("Levels")?;
    let mut table = Table::new(&[]);
    for level in &answer.levels {
        let (style, mark, what) = level_line(level);
        table.row(vec![Line::new(format!("  {}", level.name)), Line::default().add(style, mark), Line::new(what)]);
    }
    output.lines(&table.lines()[1..])?;
    levels_fixes(output, answer)?;
    output.title("Places")?;
    for HostPlace { name, path, detail, trouble, fix } in &answer.places {
        let at = if path.is_empty() { String::new() } else { format!(" {path}") };
        if trouble.is_empty() {
            output.line(&Line::new(format!("  {name}{at}: ")).add(Style::Good, detail))?;
        } else {
            // A launcher says each problem of its policy in a line of its own.
            let mut lines = trouble.lines();
            output.line(&Line::new(format!("  {name}{at}: ")).add(Style::Bad, lines.next().unwrap_or_default()))?;
            for line in lines {
                output.line(&Line::new("    ").add(Style::Bad, line.trim_start()))?;
            }
            output.line(&Line::new("    fix: ").add(Style::Plain, fix))?;
        }
    }
    if answer.controls.is_empty() {
        output.line(&Line::default())?;
        return output.line(&Line::default().add(Style::Bad, "No wall was tried: see above."));
    }
    let mut missing: Vec<&HostControl> = lacking(answer).collect();
    if missing.is_empty() {
        output.line(&Line::default())?;
        let refused = answer.levels.iter().filter(|level| level.gaps.iter().any(|gap| !gap.allowed));
        let refused: Vec<&str> = refused.map(|level| level.name.as_str()).collect();
        let but =
            if refused.is_empty() { String::new() } else { format!(", but not at {}: see above", refused.join(", ")) };
        return output.line(&Line::default().add(Style::Good, format!("Every wall can be enforced here{but}.")));
    }
    output.title("What is lacking")?;
    // Several controls often fail for one reason; it is said once.
    let mut told: Vec<(&str, &str)> = Vec::new();
    for control in &missing {
        let reason = (control.why.as_str(), control.fix.as_str());
        if told.contains(&reason) {
            continue;
        }
        told.push(reason);
        let same = missing.iter().filter(|other| (other.why.as_str(), other.fix.as_str()) == reason);
        let names = same.map(|other| other.name.as_str()).collect::<Vec<_>>().join(", ");
        output.line(&Line::new("  ").add(Style::Title, names).add(Style::Plain, format!(": {}", control.why)))?;
        output.line(&Line::new("    fix: ").add(Style::Plain, &control.fix))?;
    }
    let needed = |control: &&HostControl| {
        let mut gaps =
            answer.levels.iter().flat_map(|level| &level.gaps).filter(|gap| gap.control == control.name).peekable();
        gaps.peek().is_some() && gaps.all(|gap| !gap.may_be_allowed)
    };
    missing.retain(|control| !needed(control));
    if missing.is_empty() {
        output.line(&Line::default())?;
        return output.line(&Line::default().add(Style::Bad, "No plugin runs without them at a level that has them."));
    }
    let file = answer.places.iter().find(|place| place.name == "configuration").map_or("", |place| place.path.as_str());
    let file = if file.is_empty() { "plugvisor.toml" } else { file };
    output.title(&format!("To run plugins without them all the same, in {file} under [supervisor]"))?;
    let names = missing.iter().map(|control| format!("\"{}\"", control.name)).collect::<Vec<_>>().join(", ");
    output.line(&Line::new(format!("  allow_degraded = [{names}]")))?;
    for (level, more) in answer.levels.iter().filter_map(|level| Some((level, more(level, &missing)?))) {
        output.line(&Line::new(format!("  # and for plugins at the level {}: {more}", level.name)))?;
    }
    Ok(())
}

/// What a level lacks beside these and can do without; `None` when that would not be enough or there is nothing.
fn more(level: &HostLevel, missing: &[&HostControl]) -> Option<String> {
    if level.gaps.iter().any(|gap| !gap.may_be_allowed) {
        return None;
    }
    let named = |gap: &&LevelGap| missing.iter().any(|control| control.name == gap.control);
    let more: Vec<String> =
        level.gaps.iter().filter(|gap| !named(gap)).map(|gap| format!("\"{}\"", gap.control)).collect();
    (!more.is_empty()).then(|| more.join(", "))
}
