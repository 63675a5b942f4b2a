//! What a terminal shows while a call takes its time. On standard error, only on a terminal, only after a second.

use std::{collections::HashMap, future::Future, pin::pin, time::Duration};

use cdp_proto::v1::RevertProgress;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::time::{self, Instant};

const QUIET: Duration = Duration::from_secs(1);

/// Waits, with a spinner once that takes more than a second.
pub async fn spin<T>(what: &str, answer: impl Future<Output = T>) -> T {
    let mut answer = pin!(answer);
    if let Ok(answer) = time::timeout(QUIET, &mut answer).await {
        return answer;
    }
    let spinner = ProgressBar::new_spinner()
        .with_elapsed(QUIET)
        .with_style(style("{spinner} {msg} ({elapsed})", ProgressStyle::default_spinner))
        .with_message(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    let answer = answer.await;
    spinner.finish_and_clear();
    answer
}

/// One bar per volume for the copying behind reverts.
pub struct RevertBars {
    started: Instant,
    all: MultiProgress,
    bars: HashMap<String, ProgressBar>,
}

impl RevertBars {
    pub fn new() -> Self {
        Self { started: Instant::now(), all: MultiProgress::new(), bars: HashMap::new() }
    }

    pub fn show(&mut self, progress: &RevertProgress) {
        if self.started.elapsed() < QUIET {
            return;
        }
        let bar = self.bars.entry(progress.volume_uuid.clone()).or_insert_with(|| {
            let template = "{msg} [{wide_bar}] {percent}% {human_pos}/{human_len} blocks, {eta} left";
            let bar = ProgressBar::new(progress.blocks_total).with_style(style(template, ProgressStyle::default_bar));
            self.all.add(bar.with_message(progress.volume_name.clone()))
        });
        bar.set_length(progress.blocks_total);
        bar.set_position(if progress.done { progress.blocks_total } else { progress.blocks_done });
    }

    pub fn clear(&mut self) {
        for (_, bar) in self.bars.drain() {
            bar.finish_and_clear();
        }
    }
}

/// A bar over bytes, for work that says how far it is.
pub fn bytes(what: &str) -> impl FnMut(u64, u64) + use<> {
    let started = std::time::Instant::now();
    let message = what.to_owned();
    let mut bar: Option<ProgressBar> = None;
    move |done, total| {
        if started.elapsed() >= QUIET {
            let bar = bar.get_or_insert_with(|| {
                let template = "{msg} [{wide_bar}] {percent}% {binary_bytes}/{binary_total_bytes}, {eta} left";
                ProgressBar::new(total)
                    .with_style(style(template, ProgressStyle::default_bar))
                    .with_message(message.clone())
            });
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
    }
}

fn style(template: &str, fallback: fn() -> ProgressStyle) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| fallback())
}
