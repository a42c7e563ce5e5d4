//! Processes that a test starts: this program itself, which runs one test in a role that the environment names.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::{Net, pause, report_skipped};

const ROLE: &str = "TPROXY_TEST_ROLE";

/// The role that the parent gave to this process; `None` in the process of the test runner.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// The program and its arguments that run one test of this file.
pub fn arguments(test: &str) -> [String; 4] {
    let program = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    [program, "--exact".to_owned(), test.to_owned(), "--nocapture".to_owned()]
}

/// The name of a test, which is the name of its function.
pub fn name_of<T: Fn()>(_test: &T) -> &'static str {
    let path = std::any::type_name::<T>();
    path.split_once("::").map_or(path, |(_crate, name)| name)
}

/// A command that runs a test of this file in a role.
pub fn in_role(test: impl Fn(), role: &str) -> Command {
    by_program(&[], test, role)
}

/// The same, by way of another program and its arguments.
pub fn by_program(program: &[&str], test: impl Fn(), role: &str) -> Command {
    let own = arguments(name_of(&test));
    let all: Vec<&str> = program.iter().copied().chain(own.iter().map(String::as_str)).collect();
    let mut command = Command::new(all[0]);
    command.args(&all[1..]).env(ROLE, role);
    command
}

/// Keeps this process until its parent kills it or ends.
pub fn wait_to_be_killed() -> ! {
    let parent = std::os::unix::process::parent_id();
    while std::os::unix::process::parent_id() == parent {
        pause();
    }
    std::process::exit(1)
}

/// A process that runs a test in a role, and what it prints. It is killed at the end of the scope.
pub struct Process {
    pub child: Child,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts the command in a network namespace, and waits until it prints a line that ends with a word.
    pub fn start(net: &Net, mut command: Command, ready: &str) -> Process {
        let mut child = net.run(|| command.stdout(Stdio::piped()).spawn().unwrap());
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Process { child, output };
        while !process.line().ends_with(ready) {}
        process
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that the process prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the process has ended: {:?}", self.child.wait());
        line.trim_end().to_owned()
    }

    pub fn kill(&mut self) -> std::process::ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the body of a test in a process and a network namespace of its own. The test calls this at its beginning, with
/// itself.
pub fn alone(test: impl Fn(), body: impl FnOnce()) {
    const DONE: &str = "the body of the test has returned";
    let name = name_of(&test);
    if role().as_deref() == Some(name) {
        body();
        println!("{DONE}");
        return;
    }
    let mut command = in_role(test, name);
    let output = Net::new().run(|| command.output().unwrap());
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains(DONE), "{text}");
    text.lines().filter(|line| line.starts_with("skipped: ")).for_each(report_skipped);
}
