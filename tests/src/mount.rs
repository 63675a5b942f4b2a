//! A file system of the kernel on a volume: through nbdfuse and a loop device.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::local::{self, Loop};
use crate::process::Agent;
use crate::tools::{self, run};
use crate::{Rng, now_ns};

fn path(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// A mount of the volume through nbdfuse and a loop device: a real kernel's file system on the agent.
#[derive(Debug)]
pub struct Mount {
    fuse: Child,
    file: PathBuf,
    /// Taken when it is let go of.
    device: Option<Loop>,
    /// Where it is mounted.
    pub folder: PathBuf,
}

impl Mount {
    /// Whether this machine lets us.
    pub fn possible() -> bool {
        local::why_not().is_none()
    }

    /// Makes a file system on the volume "demo" and mounts it.
    pub fn new(agent: &Agent, mkfs: &[&str], kind: &str) -> Self {
        let (file, folder) = (agent.file("disk"), agent.file("mounted"));
        File::create(&file).unwrap();
        fs::create_dir_all(&folder).unwrap();
        let fuse = Command::new("nbdfuse")
            .args([path(&file), &agent.uri("demo")])
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdfuse runs (scripts/setup.sh installs it)");
        let size = agent.info("demo")["size"].as_u64().unwrap();
        let begun = Instant::now();
        while fs::metadata(&file).unwrap().len() != size {
            assert!(begun.elapsed() < Duration::from_secs(20), "nbdfuse does not serve the volume");
            std::thread::sleep(Duration::from_millis(20));
        }
        run(mkfs[0], mkfs[1..].iter().copied().chain([path(&file)]));
        let device = Loop::on(&file, 0, 0);
        run("mount", ["-t", kind, &device.0, path(&folder)]);
        Self { fuse, file, device: Some(device), folder }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // In a failed test some of it may not be there; every step is worth trying.
        let _ = tools::output("umount", [path(&self.folder)]);
        drop(self.device.take());
        // Who looks at new devices may hold this one for a moment.
        for _ in 0..100 {
            let _ = tools::output("fusermount3", ["-u", path(&self.file)]);
            match self.fuse.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(100)),
                _ => return,
            }
        }
        let _ = tools::output("fusermount3", ["-uz", path(&self.file)]);
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

/// Files come, grow, are renamed and go, with some syncs in between; returns instants in the middle of it all.
pub fn live_on(folder: &Path, seed: u64, steps: u64) -> (u64, u64) {
    let mut rng = Rng::new(seed);
    let begun = now_ns();
    for step in 0..steps {
        let name = folder.join(format!("file-{}", rng.below(20)));
        match rng.below(6) {
            0 => drop(fs::remove_file(&name)), // it may not be there
            1 => drop(fs::rename(&name, folder.join(format!("renamed-{}", rng.below(10))))),
            2 => fs::create_dir_all(folder.join(format!("folder-{step}"))).unwrap(),
            _ => {
                let mut data = vec![0; usize::try_from(rng.below(100_000)).unwrap()];
                rng.fill(&mut data);
                fs::write(&name, &data).unwrap();
            }
        }
        if rng.percent(20) {
            run("sync", ["-f", path(folder)]);
        }
    }
    run("sync", ["-f", path(folder)]);
    (begun, now_ns())
}
