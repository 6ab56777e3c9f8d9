//! Pictures of a schedule: text for a terminal, SVG for a browser.

use super::{Action, Span, Timeline};
use std::fmt::Write as _;

/// Most rectangles of an SVG; a longer schedule is cut.
const MAX_RECTANGLES: u64 = 100_000;

/// Most lines of a text; of a longer pipeline the first stages are drawn.
const MAX_LINES: usize = 64;

/// Forward, backward and weight gradient: the letter and its colours on the first and on the last
/// virtual stage, as red, green and blue.
const FORWARD: (char, [u8; 3], [u8; 3]) = ('F', [74, 134, 198], [188, 214, 240]);
const BACKWARD: (char, [u8; 3], [u8; 3]) = ('B', [84, 160, 96], [196, 228, 198]);
const WEIGHT: (char, [u8; 3], [u8; 3]) = ('W', [226, 146, 60], [250, 220, 180]);

fn look(action: Action) -> (char, [u8; 3], [u8; 3]) {
    match action {
        Action::Forward { .. } => FORWARD,
        Action::Backward { .. } | Action::BackwardInput { .. } => BACKWARD,
        Action::BackwardWeight { .. } => WEIGHT,
    }
}

/// The virtual stage as a letter, or as a number past the alphabet; nothing where there is one.
fn chunk_name(chunk: usize, virtual_stages: usize) -> String {
    match u8::try_from(chunk) {
        _ if virtual_stages == 1 => String::new(),
        Ok(index) if virtual_stages <= 26 => char::from(b'a' + index).to_string(),
        _ => format!(".{chunk}"),
    }
}

fn label(action: Action, virtual_stages: usize) -> String {
    let chunk = chunk_name(action.chunk(), virtual_stages);
    format!("{}{}{chunk}", look(action).0, action.micro_batch())
}

/// What the letters mean, for both pictures.
fn legend(timeline: &Timeline) -> String {
    let schedule = &timeline.schedule;
    let mut actions = timeline.stages.iter().flatten().map(|span| span.action);
    let is_split = actions.any(|action| matches!(action, Action::BackwardWeight { .. }));
    let passes = if is_split {
        "F forward, B gradient of the input, W gradients of the weights"
    } else {
        "F forward, B backward"
    };
    let mut text = format!("{passes}; numbers are micro-batches");
    if schedule.virtual_stages() > 1 {
        text.push_str(", what follows them is the virtual stage");
    }
    text
}

/// One line per stage, at most `width` columns wide, and below them what the letters mean. A unit
/// of time is as wide as the longest label; what does not fit is cut, and a line says so.
pub fn text(timeline: &Timeline, width: usize) -> String {
    let schedule = &timeline.schedule;
    let last = Action::Forward {
        chunk: schedule.virtual_stages() - 1,
        micro_batch: schedule.micro_batches() - 1,
    };
    let cell = label(last, schedule.virtual_stages()).len() + 1;
    let name_width = format!("stage {}  ", schedule.stages() - 1).len();
    let num_units = (width.saturating_sub(name_width) / cell).max(1) as u64;
    let mut out = String::new();
    for (stage, spans) in timeline.stages.iter().enumerate().take(MAX_LINES) {
        let name = format!("stage {stage}");
        let mut line = format!("{name:<name_width$}");
        let mut now = 0;
        for span in spans.iter().take_while(|span| span.start < num_units) {
            push_idle(&mut line, cell, span.start - now);
            push_span(&mut line, cell, span, schedule.virtual_stages(), num_units);
            now = span.end;
        }
        push_idle(&mut line, cell, timeline.makespan.min(num_units).saturating_sub(now));
        let _ = writeln!(out, "{}", line.trim_end());
    }
    if schedule.stages() > MAX_LINES {
        let _ = writeln!(out, "(the first {MAX_LINES} of {} stages)", schedule.stages());
    }
    if timeline.makespan > num_units {
        let _ = writeln!(out, "(the first {num_units} of {} units of time)", timeline.makespan);
    }
    let _ = writeln!(out, "{}", legend(timeline));
    out
}

fn push_idle(line: &mut String, cell: usize, units: u64) {
    for _ in 0..units {
        let _ = write!(line, "{:<cell$}", ".");
    }
}

/// The label, and where the span takes more than a unit a rule up to its end.
fn push_span(line: &mut String, cell: usize, span: &Span, chunks: usize, num_units: u64) {
    let units = span.end.min(num_units) - span.start;
    let width = cell * units as usize;
    let label = label(span.action, chunks);
    match units {
        0 => {}
        1 => {
            let _ = write!(line, "{label:<width$}");
        }
        _ => {
            let rule = width - 1;
            let _ = write!(line, "{label:-<rule$} ");
        }
    }
}

/// A picture that stands alone: one row per stage, time to the right, a rectangle per action with
/// its micro-batch, darker for the first virtual stage and lighter for the last.
pub fn svg(timeline: &Timeline) -> String {
    let schedule = &timeline.schedule;
    let digits = (schedule.micro_batches() - 1).to_string().len() as u64;
    let (left, top, row, unit) = (70u64, 30u64, 26u64, 22.max(7 * digits + 4));
    let all = timeline.stages.iter().map(|spans| spans.len() as u64).sum::<u64>();
    let shown = timeline.makespan / all.div_ceil(MAX_RECTANGLES).max(1);
    let num_rows = timeline.stages.len() as u64;
    let (width, height) = (left + unit * shown + 10, top + row * (num_rows + 1) + 10);
    // Wide enough for the lines of text above and below.
    let width = width.max(760);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"19\" font-size=\"13\">{}</text>\n",
        title(timeline, shown)
    );
    for (stage, spans) in timeline.stages.iter().enumerate() {
        let y = top + row * stage as u64;
        let (text_y, bar) = (y + 16, row - 4);
        let _ = writeln!(out, "<text x=\"8\" y=\"{text_y}\">stage {stage}</text>");
        let idle = unit * shown;
        let _ = writeln!(
            out,
            "<rect x=\"{left}\" y=\"{y}\" width=\"{idle}\" height=\"{bar}\" fill=\"#eeeeee\"/>"
        );
        for span in spans.iter().filter(|span| span.start < shown && span.start < span.end) {
            let x = left + unit * span.start;
            let width = unit * (span.end.min(shown) - span.start);
            let _ = writeln!(
                out,
                "<g><title>{}, {} to {}</title><rect x=\"{x}\" y=\"{y}\" width=\"{width}\" \
                 height=\"{bar}\" fill=\"{}\" stroke=\"white\"/><text x=\"{}\" y=\"{text_y}\" \
                 text-anchor=\"middle\">{}</text></g>",
                label(span.action, schedule.virtual_stages()),
                span.start,
                span.end,
                colour(span.action, schedule.virtual_stages()),
                x + width / 2,
                span.action.micro_batch(),
            );
        }
    }
    let y = top + row * num_rows + 16;
    let _ = writeln!(out, "<text x=\"{left}\" y=\"{y}\">{}</text>\n</svg>", legend(timeline));
    out
}

/// The sizes, the bubble, and whether the picture was cut.
fn title(timeline: &Timeline, shown: u64) -> String {
    let schedule = &timeline.schedule;
    let mut text = format!("{} stages", schedule.stages());
    if schedule.virtual_stages() > 1 {
        let _ = write!(text, " x {} virtual stages", schedule.virtual_stages());
    }
    let bubble = 100.0 * timeline.bubble_fraction();
    let _ = write!(text, ", {} micro-batches: bubble {bubble:.1} %", schedule.micro_batches());
    if shown < timeline.makespan {
        let _ = write!(text, " (the first {shown} of {} units of time)", timeline.makespan);
    }
    text
}

/// From the first virtual stage's colour to the last one's.
fn colour(action: Action, virtual_stages: usize) -> String {
    let (_, first, last) = look(action);
    let steps = virtual_stages.saturating_sub(1).max(1);
    let between = |index: usize| {
        let (from, to) = (usize::from(first[index]), usize::from(last[index]));
        (from * (steps - action.chunk().min(steps)) + to * action.chunk().min(steps)) / steps
    };
    format!("rgb({},{},{})", between(0), between(1), between(2))
}

#[cfg(test)]
mod tests {
    use super::super::{Costs, Schedule, simulate};
    use super::*;
    use run_config::PipelineSchedule::{self, Interleaved, OneForwardOneBackward, ZeroBubble};

    fn timeline(kind: PipelineSchedule, sizes: [usize; 3]) -> Timeline {
        let schedule = Schedule::new(kind, sizes[0], sizes[1], sizes[2]).unwrap();
        simulate(&schedule, Costs::UNIT).unwrap()
    }

    #[test]
    fn one_line_per_stage() {
        let expected = "\
stage 0  F0 F1 .  .  B0--- .  B1---
stage 1  .  F0 B0--- F1 B1--- .  .
F forward, B backward; numbers are micro-batches
";
        assert_eq!(text(&timeline(OneForwardOneBackward, [2, 2, 1]), 100), expected);
    }

    #[test]
    fn weight_gradients_and_virtual_stages() {
        let expected = "\
stage 0  F0 F1 .  B0 W0 B1 W1
stage 1  .  F0 B0 F1 B1 W0 W1
F forward, B gradient of the input, W gradients of the weights; numbers are micro-batches
";
        assert_eq!(text(&timeline(ZeroBubble, [2, 2, 1]), 100), expected);
        let expected = "\
stage 0  F0a F1a F0b F1b .   .   B0b---- .   B1b---- B0a---- B1a----
stage 1  .   F0a F1a F0b B0b---- F1b B1b---- B0a---- B1a---- .   .
F forward, B backward; numbers are micro-batches, what follows them is the virtual stage
";
        assert_eq!(text(&timeline(Interleaved, [2, 2, 2]), 100), expected);
    }

    #[test]
    fn wide_schedules_are_cut_with_a_note() {
        let expected = "\
stage 0  F0 F1 .  .  B0
stage 1  .  F0 B0--- F1
(the first 5 of 9 units of time)
";
        let timeline = timeline(OneForwardOneBackward, [2, 2, 1]);
        assert!(text(&timeline, 9 + 5 * 3 + 2).starts_with(expected));
        assert!(text(&timeline, 0).contains("(the first 1 of 9 units of time)"));
        let wide = super::tests::timeline(OneForwardOneBackward, [16, 512, 1]);
        assert!(text(&wide, 100).lines().take(16).all(|line| line.len() <= 100));
        let deep = super::tests::timeline(OneForwardOneBackward, [65, 1, 1]);
        assert!(text(&deep, 1000).contains("stage 63  .  .  "));
        assert!(!text(&deep, 1000).contains("stage 64"));
        assert!(text(&deep, 1000).contains("(the first 64 of 65 stages)"));
    }

    #[test]
    fn many_virtual_stages_are_numbered() {
        let action = Action::Forward { chunk: 30, micro_batch: 2 };
        assert_eq!(label(action, 31), "F2.30");
        assert_eq!(label(action, 1), "F2");
        assert_eq!(label(Action::Forward { chunk: 25, micro_batch: 2 }, 26), "F2z");
    }

    /// Every action is a rectangle with its name, and every tag is closed.
    #[test]
    fn the_svg_shows_every_action() {
        let timeline = timeline(ZeroBubble, [3, 4, 2]);
        let svg = svg(&timeline);
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<title>").count(), 3 * timeline.schedule.num_actions());
        for tag in ["svg", "g", "title", "text"] {
            let opened = svg.matches(&format!("<{tag} ")).count();
            let opened = opened + svg.matches(&format!("<{tag}>")).count();
            assert_eq!(opened, svg.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(svg.contains("<title>W3b, "), "{svg}");
        assert!(svg.contains("3 stages x 2 virtual stages, 4 micro-batches: bubble "), "{svg}");
    }

    #[test]
    fn a_long_svg_is_cut_with_a_note() {
        let long = svg(&timeline(OneForwardOneBackward, [4, 20_000, 1]));
        assert!(long.matches("<title>").count() as u64 <= MAX_RECTANGLES);
        assert!(long.contains("(the first 30004 of 60009 units of time)"), "{}", &long[..900]);
    }
}
