//! Streams that CRI serves: commands, attached clients, forwarded ports.

use bulkhead_tests::stream::{ERRORS, INPUT, OUTPUT};

use crate::pods;

#[test]
fn a_command_has_streams_and_a_terminal() {
    let test = pods("stream");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let mut plain = main.exec_stream(&["sh", "-c", "echo out; echo err >&2; exit 9"], false);
    assert_eq!(plain.wait(), 9);
    plain.wait_for(OUTPUT, "out\n");
    plain.wait_for(ERRORS, "err\n");

    let mut terminal = main.exec_stream(&["sh"], true);
    terminal.resize(33, 99).unwrap();
    // The size may come after the shell's start.
    terminal
        .send(
            INPUT,
            b"until stty size | grep '33 99'; do sleep 0.1; done; echo si''zed\n",
        )
        .unwrap();
    terminal.wait_for(OUTPUT, "33 99");
    terminal.wait_for(OUTPUT, "sized");
    terminal.send(INPUT, b"exit 3\n").unwrap();
    assert_eq!(terminal.wait(), 3);
}

#[test]
fn attached_streams_reach_the_containers_process() {
    let test = pods("attach");
    let pod = test.pod("pod").run();
    let main = pod
        .container("main", &["sh", "-c", "while read line; do echo got $line; done"])
        .with(|config| config.stdin = true)
        .start();
    let mut first = main.attach();
    first.send(INPUT, b"one\n").unwrap();
    first.wait_for(OUTPUT, "got one\n");
    let mut second = main.attach();
    second.send(INPUT, b"two\n").unwrap();
    second.wait_for(OUTPUT, "got two\n");
    main.wait_for_log("stdout F got two");
    main.stop(0);
}

#[test]
fn a_port_of_the_pods_own_address_is_forwarded() {
    let test = pods("forward");
    let pod = test.pod("pod").run();
    let script =
        "mkdir /srv; echo page > /srv/index.html; httpd -h /srv -p 127.0.0.1:8080; echo set; sleep 1000";
    let main = pod.container("main", &["sh", "-c", script]).start();
    main.wait_for_log("set");
    for _ in 0..2 {
        let mut stream = pod.port_forward(8080);
        stream.send(0, b"GET / HTTP/1.0\r\n\r\n").unwrap();
        stream.wait_for(0, "page\n");
    }
}
