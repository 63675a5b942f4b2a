use std::fs::File;
use std::os::unix::net::UnixStream;

use cdp_journal::IoBuf;
use nix::fcntl::FallocateFlags;

use super::*;

type Fd = Rc<std::os::fd::OwnedFd>;

fn on_a_ring<T: Send + 'static, F: Future<Output = T> + 'static>(test: impl FnOnce(Ring) -> F + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let ring = Ring::new().expect("io_uring");
        let future = test(ring.clone());
        ring.run(future)
    });
    thread.join().expect("the ring's thread")
}

fn sockets() -> (Fd, Fd) {
    let (one, other) = UnixStream::pair().unwrap();
    (Rc::new(one.into()), Rc::new(other.into()))
}

fn file() -> Fd {
    Rc::new(tempfile::tempfile().unwrap().into())
}

#[test]
fn timers_fire_in_the_order_of_their_deadlines() {
    let order = on_a_ring(|ring| async move {
        let order = Rc::new(RefCell::new(vec![]));
        for ms in [600_u64, 200, 400] {
            let (order, sleep) = (Rc::clone(&order), ring.sleep_ns(ms * 1_000_000));
            ring.spawn(async move {
                sleep.await;
                order.borrow_mut().push(ms);
            });
        }
        drop(ring.sleep_ns(5_000_000)); // one that nobody waits for
        while order.borrow().len() < 3 {
            ring.sleep_ns(1_000_000).await;
        }
        order.take()
    });
    assert_eq!(order, [200, 400, 600]);
}

#[test]
fn another_thread_wakes_an_idle_ring() {
    let (ask, mut asked) = tokio::sync::mpsc::unbounded_channel::<(u32, tokio::sync::oneshot::Sender<u32>)>();
    let thread = std::thread::spawn(move || {
        Ring::new().expect("io_uring").run(async move {
            while let Some((number, answer)) = asked.recv().await {
                answer.send(number + 1).unwrap();
            }
        });
    });
    for number in 0..2000 {
        let (answer, answered) = tokio::sync::oneshot::channel();
        ask.send((number, answer)).unwrap();
        assert_eq!(answered.blocking_recv().unwrap(), number + 1);
    }
    drop(ask);
    thread.join().unwrap();
}

#[test]
fn a_file_is_written_synced_punched_and_read_back() {
    on_a_ring(|ring| async move {
        let file = file();
        let parts = vec![IoBuf::copy_of(&[1; 4096]).share(), IoBuf::copy_of(&[2; 8192]).share().slice(4096, 100)];
        let (written, data) = ring.write_at(&file, Vectored::new(parts), 4096).await;
        assert_eq!((written.unwrap(), data.left()), (4196, 0));
        ring.sync_data(&file).await.unwrap();
        ring.sync_all(&file).await.unwrap();
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        ring.fallocate(&file, mode.bits(), 4096, 96).await.unwrap();
        let (read, buf) = ring.read_at(&file, IoBuf::zeroed(8192), 10, 8000, 4096).await;
        assert_eq!(read.unwrap(), 4196);
        assert!(buf[..106].iter().all(|&byte| byte == 0));
        assert!(buf[106..4106].iter().all(|&byte| byte == 1) && buf[4106..4206].iter().all(|&byte| byte == 2));
        let error = ring.fallocate(&file, 0x7fff_0000, 0, 1).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    });
}

#[test]
fn more_operations_than_the_queue_holds_all_complete() {
    let count = SQ_ENTRIES as usize * 10;
    let done = on_a_ring(move |ring| async move {
        let file = file();
        let (written, _) = ring.write_at(&file, Vectored::new(vec![IoBuf::copy_of(&[7; 512]).share()]), 0).await;
        assert_eq!(written.unwrap(), 512);
        let done = Rc::new(Cell::new(0));
        for _ in 0..count {
            let (ring, file, done) = (ring.clone(), Rc::clone(&file), Rc::clone(&done));
            ring.clone().spawn(async move {
                let (read, buf) = ring.read_at(&file, IoBuf::zeroed(512), 0, 512, 0).await;
                assert!(read.unwrap() == 512 && buf[511] == 7);
                done.set(done.get() + 1);
            });
        }
        while done.get() < count {
            ring.sleep_ns(100_000).await;
        }
        done.get()
    });
    assert_eq!(done, count);
}

#[test]
fn a_batch_of_thousands_of_pieces_arrives_whole_and_in_order() {
    on_a_ring(|ring| async move {
        let (here, there) = sockets();
        let mut batch = Box::<SendBatch>::default();
        for number in 0..5000_u32 {
            batch.push_head(&number.to_le_bytes());
            batch.push_part(IoBuf::copy_of(&[number as u8; 300]).share());
        }
        assert_eq!((batch.bytes(), batch.pieces()), (5000 * 304, 10000));
        let sender = ring.clone();
        ring.spawn(async move {
            let (sent, mut batch) = sender.send(&here, batch).await;
            sent.unwrap();
            batch.clear();
            batch.push_head(b"again");
            sender.send(&here, batch).await.0.unwrap();
        });
        let (received, buf) = ring.recv(&there, IoBuf::zeroed(5000 * 304 + 5), 0, 5000 * 304 + 5, true).await;
        assert_eq!(received.unwrap(), 5000 * 304 + 5);
        for number in 0..5000_u32 {
            let piece = &buf[number as usize * 304..][..304];
            assert_eq!(piece[..4], number.to_le_bytes());
            assert!(piece[4..].iter().all(|&byte| byte == number as u8));
        }
        assert_eq!(&buf[5000 * 304..], b"again");
    });
}

/// Goal: the kernel never writes into memory that was given back.
/// Method: drop a receive that is in the kernel; its slot stays until the completion, and the data is not lost on the next.
#[test]
fn a_dropped_receive_keeps_its_buffer_until_the_kernel_is_done() {
    on_a_ring(|ring| async move {
        let (here, there) = sockets();
        let before = ring.inner.in_kernel();
        {
            let mut receive = Box::pin(ring.recv(&there, IoBuf::zeroed(64), 0, 64, false));
            assert!(futures::poll!(&mut receive).is_pending());
            ring.sleep_ns(1_000_000).await; // now the kernel has it
            assert_eq!(ring.inner.in_kernel(), before + 1);
        }
        assert_eq!(ring.inner.in_kernel(), before + 1);
        while ring.inner.in_kernel() > before {
            ring.sleep_ns(100_000).await; // it was asked to end
        }
        let mut batch = Box::<SendBatch>::default();
        batch.push_head(b"hello");
        ring.send(&here, batch).await.0.unwrap();
        assert_eq!(ring.poll(&there, libc::POLLIN).await.unwrap() & libc::POLLIN, libc::POLLIN);
        let (received, buf) = ring.recv(&there, IoBuf::zeroed(64), 3, 61, false).await;
        assert_eq!((received.unwrap(), &buf[3..8]), (5, &b"hello"[..]));
        drop(here);
        assert_eq!(ring.recv(&there, buf, 0, 64, false).await.0.unwrap(), 0);
    });
}

#[test]
fn tasks_left_at_the_end_are_dropped() {
    struct Told(std::sync::mpsc::Sender<&'static str>, &'static str);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(self.1).unwrap();
        }
    }
    let (tell, told) = std::sync::mpsc::channel();
    on_a_ring(|ring| async move {
        let (here, there) = sockets();
        let (on_timer, on_socket) = (Told(tell.clone(), "timer"), Told(tell, "socket"));
        let (sleeper, receiver) = (ring.clone(), ring.clone());
        ring.spawn(async move {
            sleeper.sleep_ns(u64::MAX).await;
            drop(on_timer);
        });
        ring.spawn(async move {
            let _open = here;
            receiver.recv(&there, IoBuf::zeroed(64), 0, 64, false).await.0.ok();
            receiver.sleep_ns(u64::MAX).await;
            drop(on_socket);
        });
        ring.sleep_ns(1_000_000).await;
    });
    let mut dropped: Vec<_> = told.try_iter().collect();
    dropped.sort_unstable();
    assert_eq!(dropped, ["socket", "timer"]);
}

#[test]
fn a_thread_has_one_executor_at_a_time() {
    std::thread::spawn(|| {
        let first = Ring::new().unwrap();
        assert_eq!(Ring::new().err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        first.run(async {});
        drop(first);
        assert_eq!(Ring::new().unwrap().run(async { 5 }), 5);
    })
    .join()
    .unwrap();
}

/// Method: nothing but the loop's own waits can move it; a heart that stands still hangs the test.
#[test]
fn the_heartbeat_moves_while_idle() {
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let ring = Ring::new().unwrap();
        tell.send(ring.heartbeat()).unwrap();
        ring.run(ended).unwrap();
    });
    let beats = told.recv().unwrap();
    let before = beats.load(Ordering::Relaxed);
    while beats.load(Ordering::Relaxed) < before + 4 {
        std::thread::yield_now();
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    end.send(()).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_bad_descriptor_is_an_error_of_the_operation() {
    on_a_ring(|ring| async move {
        let read_only: Fd = Rc::new(File::open("/dev/null").unwrap().into());
        let (written, _) = ring.write_at(&read_only, Vectored::new(vec![IoBuf::zeroed(512).share()]), 0).await;
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EBADF));
    });
}
