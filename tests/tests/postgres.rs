//! A real database on the protected volume: PostgreSQL on ext4 on a loop device on the volume's file, under load that writes down when each
//! commit was acknowledged. Views at random instants hold exactly what was acknowledged by then, and a dropped table comes back.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cdp_tests::local::{Loop, Mounted, assert_nothing_attached, run};
use cdp_tests::process::Agent;
use cdp_tests::{Rng, now_ns, rounds, seed, skip_unless_mountable};

const CLIENTS: usize = 4;
const LOAD: Duration = Duration::from_secs(12);
const VIEWS: usize = 20;

/// The folder with PostgreSQL's programs, newest version first.
fn programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> =
        fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|entry| entry.path().join("bin")).collect();
    versions.retain(|bin| bin.join("initdb").exists() && bin.join("pg_ctl").exists());
    versions.sort();
    versions.pop()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

/// PostgreSQL on a data directory, as a user that is not root. Stopped when dropped.
struct Postgres {
    bin: PathBuf,
    user: &'static str,
    data: PathBuf,
    runs: bool,
}

impl Postgres {
    fn at(bin: &Path, data: &Path) -> Self {
        let known = nix::unistd::User::from_name("postgres").ok().flatten().is_some();
        let user = if known { "postgres" } else { "nobody" };
        Self { bin: bin.to_owned(), user, data: data.to_owned(), runs: false }
    }

    /// As the database's user.
    fn program(&self, program: &str, args: &[&str]) -> Output {
        let group = nix::unistd::User::from_name(self.user).expect("the list of users").expect("the user").gid;
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={}", self.user), &format!("--regid={group}"), "--clear-groups", "--"]);
        command.arg(self.bin.join(program)).args(args).env("LC_ALL", "C").current_dir("/");
        command.stdin(Stdio::null()).output().expect("run a program of PostgreSQL")
    }

    fn must(&self, program: &str, args: &[&str]) {
        let output = self.program(program, args);
        if !output.status.success() {
            let log = fs::read_to_string(self.data.join("log")).unwrap_or_default();
            let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            panic!("{program}: {}\n{said}\n{log}", output.status);
        }
    }

    fn init(&self) {
        let parent = self.data.parent().expect("a directory to be in");
        run("chown", &[self.user, text(parent)]);
        self.must(
            "initdb",
            &["-D", text(&self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N", "--wal-segsize=4"],
        );
        let settings = "listen_addresses = ''\nunix_socket_directories = '.'\nshared_buffers = 32MB\nmax_connections = 20\n\
                        wal_level = minimal\nmax_wal_senders = 0\nmax_wal_size = 64MB\nmin_wal_size = 16MB\n\
                        checkpoint_timeout = 30s\nautovacuum = off\nfsync = on\nsynchronous_commit = on\n";
        let path = self.data.join("postgresql.conf");
        let old = fs::read_to_string(&path).expect("the configuration");
        fs::write(&path, old + settings).expect("write the configuration");
    }

    fn start(&mut self) {
        // On a copy of a running database's disk they name a process of somebody else.
        for name in ["postmaster.pid", ".s.PGSQL.5432.lock", ".s.PGSQL.5432"] {
            let _ = fs::remove_file(self.data.join(name)); // not there after an orderly stop
        }
        let log = self.data.join("log");
        self.must("pg_ctl", &["-D", text(&self.data), "-l", text(&log), "-w", "-t", "60", "-s", "start"]);
        self.runs = true;
    }

    fn stop(&mut self, mode: &str) {
        self.must("pg_ctl", &["-D", text(&self.data), "-w", "-t", "60", "-s", "-m", mode, "stop"]);
        self.runs = false;
    }

    fn psql(&self) -> Command {
        let mut command = Command::new(self.bin.join("psql"));
        command.args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            text(&self.data),
            "-U",
            "postgres",
            "postgres",
        ]);
        command
    }

    /// What a query answers, one line per row.
    fn query(&self, sql: &str) -> Vec<String> {
        let output = self.psql().args(["-c", sql]).output().expect("run psql");
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.runs {
            self.program("pg_ctl", &["-D", text(&self.data), "-m", "immediate", "-w", "-t", "20", "stop"]);
        }
    }
}

/// When a transaction was sent and when its commit was acknowledged.
#[derive(Clone, Copy, Debug)]
struct Commit {
    sent: u64,
    acked: u64,
}

/// One client: a transaction after the other, until told to stop. Each adds a row and moves money.
fn client(database: &Postgres, number: usize, stop: &AtomicBool) -> Vec<Commit> {
    let mut child = database.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start psql");
    let mut to = child.stdin.take().expect("its input");
    let mut from = BufReader::new(child.stdout.take().expect("its output")).lines();
    let mut rng = Rng::new(number as u64);
    let mut commits = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let (row, account, delta) = (commits.len() + 1, 1 + rng.below(1000), rng.below(200));
        let sent = now_ns();
        writeln!(
            to,
            "WITH moved AS (UPDATE accounts SET balance = balance + {delta} WHERE id = {account}) \
             INSERT INTO history VALUES ({number}, {row}, {delta}) RETURNING row;"
        )
        .expect("send a transaction");
        let line = from.next().expect("an answer").expect("text");
        assert_eq!(line, row.to_string(), "client {number}");
        commits.push(Commit { sent, acked: now_ns() });
    }
    drop(to);
    child.wait().expect("psql ends");
    commits
}

/// Rows of each client, after checking that nothing is missing in the middle and that the money is right.
fn rows(database: &Postgres) -> Vec<usize> {
    let mut rows = vec![0; CLIENTS];
    for line in database.query("SELECT client, count(*), min(row), max(row) FROM history GROUP BY client") {
        let fields: Vec<usize> = line.split('|').map(|field| field.parse().expect("a number")).collect();
        assert_eq!((fields[2], fields[3]), (1, fields[1]), "rows of client {} are missing", fields[0]);
        rows[fields[0]] = fields[1];
    }
    let money =
        database.query("SELECT (SELECT sum(balance) FROM accounts) = (SELECT coalesce(sum(delta), 0) FROM history)");
    assert_eq!(money, ["t"], "each transaction is there whole or not at all");
    rows
}

/// `cdpctl bisect` with a command that starts the database on each view and asks whether the table is there.
fn look_for_the_drop(agent: &Agent, database: &Postgres, good: u64) -> serde_json::Value {
    let sockets = agent.file("sockets");
    fs::create_dir(&sockets).expect("a directory for sockets");
    // Where the agent mounts it only root may go.
    let here = agent.file("here");
    fs::create_dir(&here).expect("a directory to mount at");
    run("chown", &[database.user, text(&sockets)]);
    let group = run("id", &["-g", database.user]);
    let as_user =
        format!("setpriv --reuid={} --regid={} --clear-groups -- {}", database.user, group.trim(), text(&database.bin));
    let check = agent.file("check.sh");
    let script = format!(
        "cd /\nmount --bind $CDP_VIEW_MOUNT {here} || exit 125\ntrap 'for try in $(seq 50); do umount {here} && break; sleep 0.1; done' EXIT\n\
         data={here}/data\nrm -f $data/postmaster.pid\n\
         {as_user}/pg_ctl -D $data -l $data/log -o '-k {sockets}' -w -t 60 -s start || exit 125\n\
         found=$({as_user}/psql -X -A -t -h {sockets} -U postgres -c \"SELECT to_regclass('history') IS NOT NULL\" postgres)\n\
         {as_user}/pg_ctl -D $data -m immediate -w -t 60 -s stop\n\
         case $found in t) exit 0 ;; f) exit 1 ;; *) exit 125 ;; esac\n",
        sockets = text(&sockets),
        here = text(&here)
    );
    fs::write(&check, script).expect("write the command");
    let (from, state, log) = (good.to_string(), agent.file("bisect.json"), agent.file("bisect.log"));
    let mut args = vec!["bisect", "demo", "--from", &from, "--to", "now", "--mount", "--state", text(&state)];
    args.extend(["--log", text(&log), "--", "sh", text(&check)]);
    match agent.try_ctl(&args) {
        Ok(found) => found,
        Err(refusal) => panic!("bisect: {refusal}\n{}", fs::read_to_string(&log).unwrap_or_default()),
    }
}

/// Goal: any instant of a busy database is one that it starts from, with exactly the transactions acknowledged by then (and at most those
/// under way); and what an admin destroys comes back.
#[test]
fn a_database_at_any_instant_and_a_dropped_table_back() {
    skip_unless_mountable!();
    let Some(bin) = programs() else {
        return cdp_tests::skip("there is no PostgreSQL under /usr/lib/postgresql");
    };
    let mut rng = Rng::new(seed());
    let mut agent = Agent::dev("512MiB", "4GiB");
    // The database's user has to get to its files.
    run("chmod", &["711", text(agent.dir())]);
    let mut device = Loop::on(&agent.file("volumes/demo"), 0, 0);
    run("mkfs.ext4", &["-q", "-F", &device.0]);
    let dir = agent.file("db");
    let mut mounted = Mounted::new(&device.0, &dir);
    let mut database = Postgres::at(&bin, &dir.join("data"));
    database.init();
    mounted.sync();
    database.start();
    database.query("CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL)");
    database.query("INSERT INTO accounts SELECT id, 0 FROM generate_series(1, 1000) AS id");
    database.query("CREATE TABLE history (client int, row int, delta int, PRIMARY KEY (client, row))");
    let begun = now_ns();

    let stop = AtomicBool::new(false);
    let commits: Vec<Vec<Commit>> = thread::scope(|scope| {
        let (database, stop) = (&database, &stop);
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(database, number, stop))).collect();
        thread::sleep(LOAD);
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().expect("a client")).collect()
    });
    let ended = now_ns();
    let total: usize = commits.iter().map(Vec::len).sum();
    println!("{total} transactions in {:.1} s", LOAD.as_secs_f64());
    assert!(total > CLIENTS * 10, "that was no load");

    let looked = Instant::now();
    for _ in 0..rounds(VIEWS) {
        let time = begun + rng.below(ended - begun);
        let old = agent.file("old");
        let view = agent.ctl(&["view", "open", "demo", "--at", &time.to_string(), "--writable", "--mount", text(&old)]);
        let mut then = Postgres::at(&bin, &old.join("data"));
        then.start();
        for (number, (found, commits)) in rows(&then).into_iter().zip(&commits).enumerate() {
            let acked = commits.iter().filter(|commit| commit.acked <= time).count();
            let sent = commits.iter().filter(|commit| commit.sent <= time).count();
            assert!(
                (acked..=sent).contains(&found),
                "client {number} at {time}: {found} rows; {acked} were acknowledged by then, {sent} were sent"
            );
        }
        then.stop("immediate");
        agent.ctl(&["view", "close", view["id"].as_str().expect("its id")]);
    }
    println!("{} views in {:.1} s", rounds(VIEWS), looked.elapsed().as_secs_f64());

    // The table goes while work goes on, nobody knows when; a search that starts the database on views finds the write that did it.
    let before = rows(&database);
    let good = now_ns();
    database.query("CREATE TABLE work (step int PRIMARY KEY)");
    let work = |steps: std::ops::Range<usize>| {
        for step in steps {
            database.query(&format!("INSERT INTO work VALUES ({step})"));
        }
    };
    work(0..10);
    let sent = now_ns();
    database.query("DROP TABLE history");
    let acked = now_ns();
    work(10..20);
    let found = look_for_the_drop(&agent, &database, good);
    println!("{found}");
    let [last_good, first_bad] = ["last_good", "first_bad"].map(|key| found[key].as_u64().expect("an instant"));
    assert!(sent < first_bad && first_bad < acked, "the table went between {sent} and {acked}");
    assert_eq!(last_good + 1, first_bad);
    database.stop("immediate");
    mounted.unmount();
    drop(device);
    agent.ctl(&["revert", "demo", "--at", &last_good.to_string()]);
    device = Loop::on(&agent.file("volumes/demo"), 0, 0);
    mounted = Mounted::new(&device.0, &dir);
    database.start();
    assert_eq!(rows(&database), before, "all rows are back");
    assert_eq!(before.iter().sum::<usize>(), total);
    assert_eq!(database.query("SELECT count(*) FROM work"), ["10"], "the work of before is there, too");
    database.query("INSERT INTO history VALUES (0, 1000000, 0)");
    database.stop("fast");
    mounted.unmount();
    drop(device);
    assert_nothing_attached(agent.dir());
    agent.stop();
}
