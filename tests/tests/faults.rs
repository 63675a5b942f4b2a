use cdp_tests::faultfs::FaultFs;
use cdp_tests::rig::{Rig, Sizes};
#[test]
fn explore() {
    if !FaultFs::possible() { return; }
    let t = std::time::Instant::now();
    let rig = Rig::new(1, Sizes::SMALL, "");
    println!("up {:?}", t.elapsed());
    rig.write_some(1, 500);
    println!("written {:?}", t.elapsed());
    rig.check_live("x");
    println!("{}", serde_json::to_string_pretty(&rig.info()).unwrap());
    println!("{}", rig.agent.ctl(&["events"]));
    println!("{}", rig.agent.ctl(&["disk", "list"]));
    println!("{}", rig.agent.log_tail());
    println!("{:?}", t.elapsed());
}
